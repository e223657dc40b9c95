"""Referring expressions as JSON lines (Shikra's packaging of RefCOCO, RefCOCO+ and RefCOCOg)."""

import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from lyrics.data.records import (
    Record,
    Rejected,
    Sample,
    clipped,
    convert,
    dimensions,
    listed,
    mapping,
    name,
    numbers,
    one_line,
)
from lyrics.data.streams import json_lines


def read(path: Path) -> tuple[list[Sample], list[Rejected]]:
    """Samples whose `image_id` is the name of the image file, without folders.

    Boxes are corners in pixels; they are clipped to the image, and rejected if nothing is left.

    Raises:
        InputError: if the file is missing or damaged.
    """
    return listed(each(path))


def each(path: Path) -> Iterator[Record | Rejected]:
    """`read` as a stream."""
    count = itertools.count(1)
    return convert(path, json_lines(path), lambda value: _record(value, next(count)))


def _record(value: Any, number: int) -> Record:
    record = mapping(value)
    image = PurePosixPath(name(record.get("img_path"), "img_path")).name
    question = one_line(record.get("expression"), "expression")
    width, height = dimensions(record.get("width"), record.get("height"))
    x0, y0, x1, y1 = numbers(record.get("bbox"), 4, "box")
    sample = Sample(
        sample_id=f"refer-{number}",
        image_id=image,
        task="refer",
        kind="refer",
        question=question,
        box_xyxy=clipped((x0, y0, x1, y1), width, height),
        source=str(record.get("source", "")),
    )
    return Record(images=(image,), samples=(sample,), size=(width, height))
