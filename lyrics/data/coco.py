"""COCO captions and instances: every segmentation form, each bad record set aside with its reason."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from lyrics.data.files import MAX_PIXELS, is_safe_name, load_json, records
from lyrics.data.records import Annotation, Rejected
from lyrics.errors import InputError

ImageId = int | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoObject:
    """One annotated object, its box clipped to the image; `source` is the record as it was read."""

    image_id: ImageId
    category: str
    box_xyxy: tuple[float, float, float, float]
    rle: dict[str, Any] | None
    crowd: bool
    source: dict[str, Any]

    @property
    def clipped(self) -> bool:
        """Whether the box reached over an edge by more than a rounding."""
        x, y, w, h = self.source["bbox"]
        return max(abs(a - b) for a, b in zip(self.box_xyxy, (x, y, x + w, y + h), strict=True)) > 1

    def annotation(self) -> Annotation:
        """Without the picture and the record that it came from."""
        area: Any = self.source.get("area")
        stated = isinstance(area, int | float) and math.isfinite(area) and area > 0
        return Annotation(
            category=self.category,
            box_xyxy=self.box_xyxy,
            rle=self.rle,
            crowd=self.crowd,
            area=float(area) if stated else None,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions:
    images: dict[ImageId, dict[str, Any]]
    texts: list[tuple[ImageId, str]]
    rejected: list[Rejected]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instances:
    images: dict[ImageId, dict[str, Any]]
    categories: list[dict[str, Any]]
    objects: list[CocoObject]
    rejected: list[Rejected]


def read_captions(path: Path) -> Captions:
    """Images by id, and (image id, caption) in file order.

    Raises:
        InputError: if the file is missing, not JSON, or not in the format.
    """
    document = load_json(path)
    images, rejected = _read_images(path, document)
    texts = []
    for position, record in enumerate(records(path, document, "annotations")):
        text, image_id = record.get("caption"), record.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in images:
            rejected.append(
                _reject(path, "annotations", position, f"caption without image: {image_id!r} is not listed")
            )
        elif not isinstance(text, str) or not text.strip():
            rejected.append(_reject(path, "annotations", position, "empty caption"))
        else:
            texts.append((image_id, " ".join(text.split())))
    return Captions(images=images, texts=texts, rejected=rejected)


def read_instances(path: Path) -> Instances:
    """Images by id, categories, and objects in file order.

    Boxes that reach over the edge are clipped; a box wholly outside, or without area, is rejected.

    Raises:
        InputError: if the file is missing, not JSON, or not in the format.
    """
    document = load_json(path)
    images, rejected = _read_images(path, document)
    categories = records(path, document, "categories")
    names: dict[Any, str] = {}
    for position, category in enumerate(categories):
        name = category.get("name")
        if not isinstance(name, str) or not name.strip() or not isinstance(category.get("id"), int | str):
            raise InputError(f"{path}: categories[{position}] needs an id and a name, found {category!r:.80}")
        names[category["id"]] = name.strip()
    objects = []
    for position, record in enumerate(records(path, document, "annotations")):
        try:
            objects.append(_read_object(record, images, names))
        except _BadRecordError as error:
            rejected.append(_reject(path, "annotations", position, str(error)))
    return Instances(images=images, categories=categories, objects=objects, rejected=rejected)


class _BadRecordError(ValueError):
    """The message is the reason, its part before the first colon the class that is counted."""


def _read_images(path: Path, document: Any) -> tuple[dict[ImageId, dict[str, Any]], list[Rejected]]:
    images: dict[ImageId, dict[str, Any]] = {}
    rejected = []
    for position, record in enumerate(records(path, document, "images")):
        image_id, name = record.get("id"), record.get("file_name")
        if not isinstance(image_id, int | str):
            reason = f"image without id: found {image_id!r:.40}"
        elif not is_safe_name(name):
            reason = f"unsafe file name: {name!r:.80} would leave the folder of images"
        elif not all(isinstance(record.get(side), int) and record[side] > 0 for side in ("width", "height")):
            reason = f"image without size: width {record.get('width')!r}, height {record.get('height')!r}"
        elif record["width"] * record["height"] > MAX_PIXELS:
            reason = f"image too large: {record['width']} x {record['height']}, at most {MAX_PIXELS} pixels are read"
        elif image_id in images:
            reason = f"repeated image id: {image_id!r}"
        else:
            images[image_id] = record
            continue
        rejected.append(_reject(path, "images", position, reason))
    return images, rejected


def _read_object(record: dict[str, Any], images: dict[ImageId, dict[str, Any]], names: dict[Any, str]) -> CocoObject:
    image_id, category_id = record.get("image_id"), record.get("category_id")
    if not isinstance(image_id, int | str) or image_id not in images:
        raise _BadRecordError(f"object without image: {image_id!r} is not listed")
    if not isinstance(category_id, int | str) or category_id not in names:
        raise _BadRecordError(f"unknown category: {category_id!r}")
    image = images[image_id]
    return CocoObject(
        image_id=image_id,
        category=names[category_id],
        box_xyxy=clip_box(record.get("bbox"), image["width"], image["height"]),
        rle=to_rle(record.get("segmentation"), image["width"], image["height"]),
        crowd=bool(record.get("iscrowd", 0)),
        source=record,
    )


def clip_box(bbox: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """COCO's x, y, width, height as corners inside the image.

    Raises:
        ValueError: if it is no box, or lies wholly outside.
    """
    numbers = isinstance(bbox, list | tuple) and len(bbox) == 4
    if not numbers or not all(isinstance(v, int | float) and math.isfinite(v) for v in bbox):
        raise _BadRecordError(f"bad box: expected four finite numbers, found {bbox!r:.60}")
    x, y, w, h = (float(value) for value in bbox)
    if x + w <= x or y + h <= y:
        raise _BadRecordError(f"bad box: no area in {bbox!r:.60}")
    x0, y0, x1, y1 = max(0.0, x), max(0.0, y), min(float(width), x + w), min(float(height), y + h)
    if x0 >= x1 or y0 >= y1:
        raise _BadRecordError(f"box outside image: {bbox!r:.60} in {width} x {height}")
    return x0, y0, x1, y1


def to_rle(segmentation: Any, width: int, height: int) -> dict[str, Any] | None:
    """Polygons, or run lengths as a list or a string, as compressed run lengths (counts as str). None: no mask.

    Raises:
        ValueError: if it is none of these or its size is not the image's.
    """
    if not segmentation:
        return None
    try:
        if isinstance(segmentation, list):
            if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
                raise _BadRecordError("bad mask: a polygon needs at least three points")
            limit = 2 * max(width, height)  # pycocotools walks every pixel of an edge, however far outside
            if not all(isinstance(v, int | float) and abs(v) <= limit for polygon in segmentation for v in polygon):
                raise _BadRecordError(f"bad mask: a polygon leaves its {width} x {height} image by far")
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation, dict) and list(segmentation.get("size", ())) == [height, width]:
            counts = segmentation["counts"]
            if isinstance(counts, list):
                if sum(counts) != width * height or min(counts, default=0) < 0:
                    raise _BadRecordError(f"bad mask: run lengths do not add up to {width} x {height}")
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                if sum(_run_lengths(counts)) != width * height:
                    raise _BadRecordError(f"bad mask: run lengths do not add up to {width} x {height}")
                rle = {"counts": counts.encode()}
        else:
            raise _BadRecordError(f"bad mask: not a segmentation of a {width} x {height} image: {segmentation!r:.60}")
    except _BadRecordError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise _BadRecordError(f"bad mask: {error}") from None
    return {"size": [height, width], "counts": rle["counts"].decode()}


def _run_lengths(counts: str) -> list[int]:
    """What a compressed string stands for. Checked here because pycocotools reads beyond the end of a cut one.

    Raises:
        ValueError: if it is cut off or has a negative length.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError("run lengths have a character that does not belong there")
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        if len(lengths) > 2:
            value += lengths[-2]
        if value < 0:
            raise ValueError("a run length is negative")
        lengths.append(value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths are cut off")
    return lengths


def _reject(path: Path, key: str, position: int, reason: str) -> Rejected:
    return Rejected(source=str(path), record=f"{key}[{position}]", reason=reason)
