"""COCO captions and instances: every segmentation form, each bad record set aside with its reason."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pycocotools import mask as coco_mask

from lyrics.data.files import MAX_PIXELS, is_safe_name
from lyrics.data.records import (
    Annotation,
    BadRecordError,
    Box,
    Rejected,
    brief,
    clipped,
    identifier,
    mapping,
    numbers,
    one_line,
)
from lyrics.data.streams import elements
from lyrics.errors import InputError

ImageId = int | str
ImageOf = Callable[[ImageId], dict[str, Any] | None]
MAX_CATEGORIES = 100_000
_RUN_BITS = 35  # in groups of five; no picture has a longer run
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CocoObject:
    """One annotated object, its box clipped to the image; `source` is the record as it was read."""

    image_id: ImageId
    category: str
    box_xyxy: Box
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
    images, rejected = _read_images(path)
    texts = []
    for place, found in each_caption(path, images.get):
        if isinstance(found, BadRecordError):
            rejected.append(Rejected(source=str(path), record=place, reason=str(found)))
        else:
            texts.append(found)
    return Captions(images=images, texts=texts, rejected=rejected)


def read_instances(path: Path) -> Instances:
    """Images by id, categories, and objects in file order.

    Boxes that reach over the edge are clipped; a box wholly outside, or without area, is rejected.

    Raises:
        InputError: if the file is missing, not JSON, or not in the format.
    """
    images, rejected = _read_images(path)
    categories = read_categories(path)
    objects = []
    for place, found in each_object(path, categories, images.get):
        if isinstance(found, BadRecordError):
            rejected.append(Rejected(source=str(path), record=place, reason=str(found)))
        else:
            objects.append(found)
    return Instances(images=images, categories=list(categories.values()), objects=objects, rejected=rejected)


def _read_images(path: Path) -> tuple[dict[ImageId, dict[str, Any]], list[Rejected]]:
    images: dict[ImageId, dict[str, Any]] = {}
    rejected = []
    for place, image in each_image(path):
        if isinstance(image, BadRecordError):
            reason = str(image)
        elif image["id"] in images:
            reason = f"repeated image id: {image['id']!r}"
        else:
            images[image["id"]] = image
            continue
        rejected.append(Rejected(source=str(path), record=place, reason=reason))
    return images, rejected


def each_image(path: Path) -> Iterator[tuple[str, dict[str, Any] | BadRecordError]]:
    """Place and id, file_name, width, height (and our own source) of each listed image; repeated ids are not sought."""
    yield from _each(path, "images", _image)


def each_caption(path: Path, image_of: ImageOf) -> Iterator[tuple[str, tuple[ImageId, str] | BadRecordError]]:
    """Place, image id and text of each caption. `image_of` gives the record of an image that is listed."""

    def one(record: dict[str, Any]) -> tuple[ImageId, str]:
        image_id = record.get("image_id")
        if not isinstance(image_id, int | str) or image_of(image_id) is None:
            raise BadRecordError(f"caption without image: {brief(image_id)} is not listed")
        if not isinstance(record.get("caption"), str) or not record["caption"].strip():
            raise BadRecordError("empty caption")
        return image_id, one_line(record["caption"], "caption")

    yield from _each(path, "annotations", one)


def each_object(
    path: Path, categories: dict[ImageId, dict[str, Any]], image_of: ImageOf
) -> Iterator[tuple[str, CocoObject | BadRecordError]]:
    """Place and object of each annotation. `image_of` gives the record of an image that is listed."""
    yield from _each(path, "annotations", lambda record: _object(record, image_of, categories))


def read_categories(path: Path) -> dict[ImageId, dict[str, Any]]:
    """Categories by id: id, name on one line, supercategory where there is one.

    Raises:
        InputError: if one has no id or no name, or there are more than anybody would name.
    """
    categories: dict[ImageId, dict[str, Any]] = {}
    for place, value in elements(path, "categories"):
        try:
            category = mapping(value)
            category_id = _id(category, "category")
            known = {"id": category_id, "name": one_line(category.get("name"), "name")}
            if category.get("supercategory"):
                known["supercategory"] = one_line(category["supercategory"], "supercategory")
        except BadRecordError as error:
            raise InputError(f"{path}: {place} needs an id and a name: {error}") from None
        categories[category_id] = known
        if len(categories) > MAX_CATEGORIES:
            raise InputError(f"{path} lists more than {MAX_CATEGORIES} categories; expected a list of kinds of objects")
    return categories


def _each(path: Path, key: str, one: Callable[[dict[str, Any]], _T]) -> Iterator[tuple[str, _T | BadRecordError]]:
    for place, value in elements(path, key):
        try:
            if isinstance(value, BadRecordError):
                raise value
            yield place, one(mapping(value))
        except BadRecordError as error:
            yield place, error


def _id(record: dict[str, Any], what: str) -> ImageId:
    if not isinstance(record.get("id"), int | str):
        raise BadRecordError(f"{what} without id: found {brief(record.get('id'))}")
    identifier(record["id"])  # no endless one
    return record["id"]


def _image(record: dict[str, Any]) -> dict[str, Any]:
    name, width, height = (record.get(key) for key in ("file_name", "width", "height"))
    image_id = _id(record, "image")
    if not is_safe_name(name):
        raise BadRecordError(f"unsafe file name: {brief(name)} would leave the folder of images")
    if not isinstance(width, int) or not isinstance(height, int) or width <= 0 or height <= 0:
        raise BadRecordError(f"image without size: width {brief(width)}, height {brief(height)}")
    if width * height > MAX_PIXELS:
        raise BadRecordError(f"image too large: {brief(width)} x {brief(height)}, at most {MAX_PIXELS} pixels are read")
    return {"id": image_id, "file_name": name, "width": width, "height": height, "source": record.get("source", "")}


def _object(record: dict[str, Any], image_of: ImageOf, categories: dict[ImageId, dict[str, Any]]) -> CocoObject:
    image_id, category_id = record.get("image_id"), record.get("category_id")
    image = image_of(image_id) if isinstance(image_id, int | str) else None
    if image is None:
        raise BadRecordError(f"object without image: {brief(image_id)} is not listed")
    if not isinstance(category_id, int | str) or category_id not in categories:
        raise BadRecordError(f"unknown category: {brief(category_id)}")
    return CocoObject(
        image_id=image["id"],
        category=categories[category_id]["name"],
        box_xyxy=clip_box(record.get("bbox"), image["width"], image["height"]),
        rle=to_rle(record.get("segmentation"), image["width"], image["height"]),
        crowd=bool(record.get("iscrowd", 0)),
        source=record,
    )


def clip_box(bbox: Any, width: int, height: int) -> Box:
    """COCO's x, y, width, height as corners inside the image.

    Raises:
        ValueError: if it is no box, or lies wholly outside.
    """
    x, y, w, h = numbers(bbox, 4, "box")
    return clipped((x, y, x + w, y + h), width, height)


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
                raise BadRecordError("bad mask: a polygon needs at least three points")
            limit = 2 * max(width, height)  # pycocotools walks every pixel of an edge, however far outside
            if not all(isinstance(v, int | float) and abs(v) <= limit for polygon in segmentation for v in polygon):
                raise BadRecordError(f"bad mask: a polygon leaves its {width} x {height} image by far")
            if sum(map(_edge_pixels, segmentation)) > width * height + limit:
                raise BadRecordError(f"bad mask: more edge than a {width} x {height} image has pixels")
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation, dict) and list(segmentation.get("size", ())) == [height, width]:
            counts = segmentation["counts"]
            if isinstance(counts, list):
                if sum(counts) != width * height or min(counts, default=0) < 0:
                    raise BadRecordError(f"bad mask: run lengths do not add up to {width} x {height}")
                rle = coco_mask.frPyObjects(segmentation, height, width)
            else:
                if sum(_run_lengths(counts)) != width * height:
                    raise BadRecordError(f"bad mask: run lengths do not add up to {width} x {height}")
                rle = {"counts": counts.encode()}
        else:
            raise BadRecordError(f"bad mask: not a segmentation of a {width} x {height} image: {brief(segmentation)}")
    except BadRecordError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRecordError(f"bad mask: {error}") from None
    return {"size": [height, width], "counts": rle["counts"].decode()}


def _edge_pixels(polygon: list[float]) -> float:
    """How many pixels its edges cross, about: what pycocotools needs memory for."""
    xs, ys = polygon[0::2], polygon[1::2]
    edges = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return sum(max(abs(x1 - x0), abs(y1 - y0)) for x0, y0, x1, y1 in edges)


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
        if shift > _RUN_BITS:
            raise ValueError("a run length is endless")
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
