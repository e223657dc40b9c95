"""RefCOCO, RefCOCO+ and RefCOCOg as REFER packs them: refs(*).p, a pickle of plain values, and instances.json."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data import coco
from lyrics.data.disk_index import Index
from lyrics.data.readers.pickles import load_plain
from lyrics.data.records import (
    BadRecordError,
    Record,
    Rejected,
    Sample,
    convert,
    identifier,
    mapping,
    numbers,
    one_line,
)
from lyrics.data.streams import elements
from lyrics.errors import InputError


def each(refs: Path, instances: Path, part: str | None = None) -> Iterator[Record | Rejected]:
    """A record for each object that is referred to, a sample for each of its sentences.

    Args:
        part: `train`, `val`, `testA` …; None for all.

    Raises:
        InputError: if a file is missing, damaged, or the pickle holds more than plain values.
    """
    found = load_plain(refs)
    if not isinstance(found, list):
        raise InputError(f"{refs}: expected a pickled list of expressions, found {type(found).__name__}")
    with contextlib.closing(Index()) as images, contextlib.closing(Index()) as boxes:
        for place, image in coco.each_image(instances):
            if isinstance(image, BadRecordError):
                yield Rejected(source=str(instances), record=place, reason=str(image))
            else:
                images.add(image["id"], value=json.dumps(image))

        def keep(value: Any) -> None:
            record = mapping(value)
            box = numbers(record.get("bbox"), 4, "box")
            boxes.add(identifier(record.get("id")), value=json.dumps([*box, record.get("image_id")]))

        yield from convert(instances, elements(instances, "annotations"), keep)
        places = ((f"[{i}]", value) for i, value in enumerate(found))
        yield from convert(refs, places, lambda value: _record(value, images, boxes, part))


def _record(value: Any, images: Index, boxes: Index, part: str | None) -> Record | None:
    ref = mapping(value)
    if part is not None and ref.get("split") != part:
        return None
    box = boxes.get(identifier(ref.get("ann_id")))
    image = images.get(identifier(ref.get("image_id")))
    if box is None or image is None:
        raise BadRecordError("expression without object: its ann_id or image_id is not in instances.json")
    x, y, width, height, image_id = json.loads(box)
    if str(image_id) != str(ref.get("image_id")):
        raise BadRecordError("expression without object: its ann_id is in another image")
    known = json.loads(image)
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise BadRecordError("no expression: expected sentences")
    samples = tuple(
        Sample(
            sample_id=f"refer-{identifier(mapping(sentence).get('sent_id'))}",
            image_id=known["file_name"],
            task="refer",
            kind="refer",
            question=one_line(sentence.get("sent") or sentence.get("raw"), "expression"),
            box_xyxy=(x, y, x + width, y + height),
        )
        for sentence in sentences[:1000]
    )
    base = known["file_name"].rpartition("/")[2]
    return Record(images=(known["file_name"], base), samples=samples, size=(known["width"], known["height"]))
