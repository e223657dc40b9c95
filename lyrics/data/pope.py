"""POPE (JSON lines): is there such an object in the image? Yes and no equally often, three ways to pick the no."""

import collections
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lyrics.data.records import (
    BadRecordError,
    Record,
    Rejected,
    Sample,
    convert,
    identifier,
    listed,
    mapping,
    name,
    one_line,
    text,
)
from lyrics.data.streams import json_lines

CATEGORIES = ("random", "popular", "adversarial")
_PER_IMAGE = 3


def sample(presence: dict[str, list[str]], names: list[str], generator: np.random.Generator) -> list[dict[str, Any]]:
    """Questions for each image: up to three present objects, as many absent ones per category.

    Args:
        presence: file name → the categories in the picture.
        names: all categories.

    Absent ones are any (random), the most frequent in these images (popular), or those seen most often together with
    what is present (adversarial). Images without objects, or with all, are not asked about.
    """
    frequency = collections.Counter(name for present in presence.values() for name in set(present))
    together: dict[str, collections.Counter[str]] = {one: collections.Counter() for one in names}
    for present in presence.values():
        for one in set(present):
            together[one].update(set(present) - {one})
    lines: list[dict[str, Any]] = []
    for image, present in presence.items():
        there = sorted(set(present))
        absent = [name for name in names if name not in there]
        count = min(_PER_IMAGE, len(there), len(absent))
        asked = [there[i] for i in generator.permutation(len(there))[:count]]
        for category in CATEGORIES:
            order = [absent[i] for i in generator.permutation(len(absent))]
            if category == "popular":
                order.sort(key=lambda name: -frequency[name])
            elif category == "adversarial":
                company = sum((together[other] for other in there), collections.Counter())
                order.sort(key=lambda name, company=company: -company[name])  # type: ignore[misc]
            for positive, negative in zip(asked, order[:count], strict=True):
                for one, label in ((positive, "yes"), (negative, "no")):
                    lines.append({"image": image, "text": question(one), "label": label, "category": category})
    return [{"question_id": number, **line} for number, line in enumerate(lines, start=1)]


def question(name: str) -> str:
    return f"Is there {'an' if name[0].lower() in 'aeiou' else 'a'} {name} in the image?"


def read(path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Samples whose `image_id` is the file name in the record (POPE knows no other). `kind` is the category.

    The official files have no category: there, the file name's last part (`coco_pope_random`) is the kind.

    Raises:
        InputError: if the file is missing or damaged.
    """
    return listed(each(path))


def each(path: Path) -> Iterator[Record | Rejected]:
    """`read` as a stream."""
    fallback = path.stem.rpartition("_")[2] or "pope"
    count = itertools.count(1)
    return convert(path, json_lines(path), lambda value: _record(value, next(count), fallback))


def _record(value: Any, number: int, fallback: str) -> Record:
    record = mapping(value)
    label = record["label"].strip().lower() if isinstance(record.get("label"), str) else ""
    if label not in ("yes", "no"):
        raise BadRecordError("bad answer: a POPE line needs a label yes or no")
    image = name(record.get("image"))
    sample = Sample(
        sample_id=f"pope-{identifier(record.get('question_id', number))}",
        image_id=image,
        task="pope",
        kind=one_line(record.get("category", fallback), "category"),
        question=text(record.get("text"), "question"),
        references=(label,),
        source=str(record.get("source", "")),
    )
    return Record(images=(image,), samples=(sample,))
