"""COCO captions and instances, an image at a time: what the files say about it waits on disk until it is its turn."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lyrics.data import coco
from lyrics.data.disk_index import Groups, Index
from lyrics.data.records import Annotation, BadRecordError, Record, Rejected, Sample
from lyrics.data.streams import elements

MAX_PER_IMAGE = 2_000


def each(path: Path, second: Path | None = None) -> Iterator[Record | Rejected]:
    """A record for each listed image, with its captions and objects.

    Args:
        path, second: captions, instances, or both in any order.

    Raises:
        InputError: if a file is missing, damaged or not in the format.
    """
    with contextlib.closing(Index()) as images, contextlib.closing(Groups()) as said:
        for file in filter(None, (path, second)):
            yield from _remember(file, images, said)
        for file in filter(None, (path, second)):
            for place, image in coco.each_image(file):
                known = None if isinstance(image, BadRecordError) else images.get(image["id"])
                if known is not None and json.loads(known)["from"] == [str(file), place]:
                    yield _record(json.loads(known), said, str(file), place)


def _remember(file: Path, images: Index, said: Groups) -> Iterator[Rejected]:
    """Every image under its id, and what is said about it."""
    for place, image in coco.each_image(file):
        if isinstance(image, BadRecordError):
            yield Rejected(source=str(file), record=place, reason=str(image))
        elif not images.add(image["id"], value=json.dumps({**image, "from": [str(file), place]})):
            known = json.loads(images.get(image["id"]) or "{}")
            if known["from"][0] == str(file):
                yield Rejected(source=str(file), record=place, reason=f"repeated image id: {image['id']!r}")

    def image_of(image_id: coco.ImageId) -> dict[str, Any] | None:
        known = images.get(image_id)
        return None if known is None else json.loads(known)

    found: Iterator[tuple[str, Any]]
    if _has_categories(file):
        found = coco.each_object(file, coco.read_categories(file), image_of)
    else:
        found = coco.each_caption(file, image_of)
    for place, item in found:
        if isinstance(item, BadRecordError):
            yield Rejected(source=str(file), record=place, reason=str(item))
        elif isinstance(item, coco.CocoObject):
            said.add(item.image_id, value=json.dumps([item.category, item.box_xyxy, item.rle, item.crowd]))
        else:
            said.add(item[0], value=json.dumps(item[1]))


def _has_categories(file: Path) -> bool:
    """Whether the file is one of instances, by the first of its annotations."""
    for _, annotation in elements(file, "annotations"):
        if isinstance(annotation, dict):
            return "category_id" in annotation
    return False


def _record(image: dict[str, Any], said: Groups, file: str, place: str) -> Record:
    captions, objects = [], []
    for value in map(json.loads, said.of(image["id"], limit=MAX_PER_IMAGE)):
        if isinstance(value, str):
            captions.append(value)
        else:
            category, (x0, y0, x1, y1), rle, crowd = value
            objects.append(Annotation(category=category, box_xyxy=(x0, y0, x1, y1), rle=rle, crowd=crowd))
    name = image["file_name"]
    samples = tuple(
        Sample(
            sample_id=f"caption-{image['id']}-{i}", image_id=name, task="caption", kind="caption", references=(text,)
        )
        for i, text in enumerate(captions)
    )
    return Record(
        images=(name, name.rpartition("/")[2]),
        samples=samples,
        annotations=tuple(objects),
        size=(image["width"], image["height"]),
        source=file,
        place=place,
    )
