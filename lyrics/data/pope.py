"""POPE (JSON lines): is there such an object in the image? Yes and no equally often, three ways to pick the no."""

import collections
from pathlib import Path
from typing import Any

import numpy as np

from lyrics.data.files import load_json_lines
from lyrics.data.records import Rejected, Sample

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
    together: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    for present in presence.values():
        for name in set(present):
            together[name].update(set(present) - {name})
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
                for name, label in ((positive, "yes"), (negative, "no")):
                    lines.append({"image": image, "text": question(name), "label": label, "category": category})
    return [{"question_id": number, **line} for number, line in enumerate(lines, start=1)]


def question(name: str) -> str:
    return f"Is there {'an' if name[0].lower() in 'aeiou' else 'a'} {name} in the image?"


def read(path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Samples whose `image_id` is the file name in the record (POPE knows no other). `kind` is the category.

    The official files have no category: there, the file name's last part (`coco_pope_random`) is the kind.

    Raises:
        InputError: if the file is missing or not JSON lines.
    """
    samples, rejected = [], []
    fallback = path.stem.rpartition("_")[2] or "pope"
    for number, record in enumerate(load_json_lines(path), start=1):
        usable = isinstance(record, dict) and all(
            isinstance(record.get(key), str) for key in ("image", "text", "label")
        )
        label = record["label"].strip().lower() if usable else ""
        if label not in ("yes", "no"):
            reason = "a POPE line needs image, text and label yes or no"
            rejected.append(Rejected(source=str(path), record=f"line {number}", reason=reason))
            continue
        samples.append(
            Sample(
                sample_id=f"pope-{record.get('question_id', number)}",
                image_id=record["image"],
                task="pope",
                kind=str(record.get("category", fallback)),
                question=record["text"].strip(),
                references=(label,),
            )
        )
    return samples, rejected
