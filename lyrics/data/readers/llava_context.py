"""What LLaVA's authors gave GPT-4 to see of a picture: JSON lines with captions, and objects in fractions of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data.records import (
    Annotation,
    BadRecordError,
    Record,
    Rejected,
    Sample,
    convert,
    mapping,
    name,
    numbers,
    one_line,
)
from lyrics.data.streams import json_lines
from lyrics.data.vqa import image_names


def each(path: Path) -> Iterator[Record | Rejected]:
    """A record for each picture, with its captions and objects. A record with one bad part is rejected whole.

    Raises:
        InputError: if the file is missing or damaged.
    """
    return convert(path, json_lines(path), _record)


def _record(value: Any) -> Record:
    line = mapping(value)
    image = name(line.get("image"))
    captions, objects = line.get("captions", []), line.get("instances", [])
    if not isinstance(captions, list) or not isinstance(objects, list):
        raise BadRecordError("bad record: captions and instances should be lists")
    samples = tuple(
        Sample(
            sample_id=f"caption-{image}-{i}",
            image_id=image,
            task="caption",
            kind="caption",
            references=(one_line(caption, "caption"),),
        )
        for i, caption in enumerate(captions)
    )
    number = image.partition(".")[0].lstrip("0") or "0"
    return Record(
        images=(image, *image_names(number)),
        samples=samples,
        annotations=tuple(map(_object, objects)),
        in_fractions=True,
    )


def _object(value: Any) -> Annotation:
    item = mapping(value)
    x0, y0, x1, y1 = numbers(item.get("bbox"), 4, "box")
    return Annotation(category=one_line(item.get("category"), "category", 200), box_xyxy=(x0, y0, x1, y1))
