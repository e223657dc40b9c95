"""Folders in COCO format as raw data: checked, copied byte for byte, with yes/no and counting questions derived.

Pixels are used as they are stored: EXIF orientation is ignored everywhere, because boxes refer to stored pixels.
"""

import collections
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from lyrics import seeding
from lyrics.data import coco, pope, vqa
from lyrics.data.files import BadImageError, decode, pixel_hash
from lyrics.data.formats import write_coco, write_json_lines
from lyrics.data.held_out import EVALUATED, HeldOut
from lyrics.data.ledger import Ledger
from lyrics.data.records import Rejected
from lyrics.data.webdataset import WebPair, write_tar
from lyrics.errors import InputError

if TYPE_CHECKING:
    from lyrics.config import Config

# Evaluated splits come first: an image that is in two splits stays in the one that measures.
SPLITS = ("test", "test_ood", "val", "foundation", "instruct", "web")
_PAIRS_PER_SHARD = 500
_QUESTIONS_PER_IMAGE = 6
_IRREGULAR = {"person": "people", "sheep": "sheep", "mouse": "mice", "knife": "knives", "skis": "skis"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """One split as read: images that decode, with their captions and objects."""

    folder: Path
    images: list[dict[str, Any]]
    captions: dict[coco.ImageId, list[str]]
    objects: dict[coco.ImageId, list[coco.CocoObject]]
    categories: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the splits before had: pictures by what they look like, and of which split each is by its pixels."""

    held_out: HeldOut
    owner_of: dict[str, str] = dataclasses.field(default_factory=dict)


def ingest(config: "Config", destination: Path, ledger: Ledger) -> dict[str, dict[str, int]]:
    """Check all splits, then write them; counts by split.

    Raises:
        InputError: before anything is written, if a folder or file is missing or unreadable, or a split is empty.
    """
    root = Path(config.data.folder or "")
    try:
        sources, rejected = _read_all(config, root)
    except PermissionError as error:
        raise InputError(f"{error.filename} may not be read; give yourself permission to read it") from None
    counts = {}
    for split, source in sources.items():
        if split == "web":
            counts[split] = _write_web(config.seed, source, destination / "web")
        else:
            counts[split] = _write_annotated(config.seed, split, source, destination / split)
    for record in rejected:
        ledger.add(record)
    return counts


def _read_all(config: "Config", root: Path) -> tuple[dict[str, _Source], list[Rejected]]:
    data = config.data
    unknown = sorted(set(data.splits) - set(SPLITS))
    if unknown or not data.splits:
        raise InputError(f"data.splits names {unknown or 'no splits'}; expected some of {', '.join(sorted(SPLITS))}")
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; set `folder` to one with {', '.join(sorted(data.splits.values()))}")
    rejected: list[Rejected] = []
    seen = _Seen(HeldOut(data.leak_hamming_bits))
    sources: dict[str, _Source] = {}
    for split in SPLITS:
        if split in data.splits:
            sources[split] = _read(split, root / data.splits[split], data.max_images, seen, rejected)
    # One sub-folder may serve two splits; what is wrong in it is reported once.
    return sources, list(dict.fromkeys(rejected))


def _read(split: str, folder: Path, max_images: int | None, seen: _Seen, rejected: list[Rejected]) -> _Source:
    """Read and check one split; `seen` grows."""
    for needed in ("images", "captions.json", "instances.json"):
        path = folder / needed
        if not path.exists():
            raise InputError(f"{path} is missing; a split needs images/, captions.json and instances.json")
    captions = coco.read_captions(folder / "captions.json")
    instances = coco.read_instances(folder / "instances.json")
    rejected += captions.rejected + instances.rejected
    listed = captions.images | instances.images
    images: list[dict[str, Any]] = []
    for image in tqdm(listed.values(), f"check {split}"):
        if len(images) == max_images:
            break
        reason = _fault(split, folder, image, seen)
        if reason is None:
            images.append({key: image[key] for key in ("id", "file_name", "width", "height")})
        else:
            rejected.append(Rejected(source=str(folder / "images"), record=str(image["file_name"]), reason=reason))
    if not images:
        raise InputError(
            f"{folder}: no usable image for {split} among {len(listed)} listed ({_common(rejected)}); "
            "check that images/ holds the files that captions.json names"
        )
    kept = {image["id"] for image in images}
    texts: dict[coco.ImageId, list[str]] = collections.defaultdict(list)
    for image_id, text in captions.texts:
        if image_id in kept:
            texts[image_id].append(text)
    if split == "web" and not texts:
        raise InputError(f"{folder / 'captions.json'} has no usable caption; web pairs need one an image")
    objects: dict[coco.ImageId, list[coco.CocoObject]] = collections.defaultdict(list)
    for item in instances.objects:
        if item.image_id in kept:
            objects[item.image_id].append(item)
    return _Source(
        folder=folder, images=images, captions=dict(texts), objects=dict(objects), categories=instances.categories
    )


def _fault(split: str, folder: Path, image: dict[str, Any], seen: _Seen) -> str | None:
    path = folder / "images" / image["file_name"]
    if not path.is_file():
        return "missing image file: its captions and objects are set aside too"
    try:
        picture = decode(path)
    except BadImageError as error:
        return f"unusable image: {error}"
    if picture.size != (image["width"], image["height"]):
        return f"wrong size: listed {image['width']} x {image['height']}, stored {picture.width} x {picture.height}"
    digest = pixel_hash(picture)
    owner = seen.owner_of.setdefault(digest, split)
    if owner != split and (owner in EVALUATED or split in EVALUATED):
        return f"shared between splits: the same picture is in {owner}, so not in {split}"
    seen.held_out.add(split, image["file_name"], picture)
    return seen.held_out.fault(split, picture)


def _common(rejected: list[Rejected]) -> str:
    reasons = collections.Counter(record.reason.partition(":")[0] for record in rejected)
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)) or "none listed"


def _write_web(seed: int, source: _Source, folder: Path) -> dict[str, int]:
    """One pair per picture: cleaning would drop the same picture with another caption as a duplicate."""
    images = [image for image in source.images if image["id"] in source.captions]
    for shard, start in enumerate(range(0, len(images), _PAIRS_PER_SHARD)):
        group = images[start : start + _PAIRS_PER_SHARD]
        write_tar(folder / f"{shard:05d}.tar", (_pair(seed, shard, i, image, source) for i, image in enumerate(group)))
    return {"pairs": len(images)}


def _pair(seed: int, shard: int, index: int, image: dict[str, Any], source: _Source) -> WebPair:
    options = source.captions[image["id"]]
    return WebPair(
        key=f"{shard:05d}{index:04d}",
        image_bytes=(source.folder / "images" / image["file_name"]).read_bytes(),
        caption=options[int(seeding.rng(seed, "web caption", image["id"]).integers(len(options)))],
        meta={
            "url": image["file_name"],
            "width": image["width"],
            "height": image["height"],
            "annotations": [_web_annotation(item) for item in source.objects.get(image["id"], ())],
        },
    )


def _web_annotation(item: coco.CocoObject) -> dict[str, Any]:
    """What the oracle refiner reads of a web pair."""
    x0, y0, x1, y1 = item.box_xyxy
    return {"category": item.category, "bbox": [x0, y0, x1 - x0, y1 - y0], "rle": item.rle}


def _write_annotated(seed: int, split: str, source: _Source, folder: Path) -> dict[str, int]:
    for image in source.images:
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((source.folder / "images" / image["file_name"]).read_bytes())
    ids = [image["id"] for image in source.images]
    captions = [(image_id, text) for image_id in ids for text in source.captions.get(image_id, ())]
    annotations = [_annotation(item) for image_id in ids for item in source.objects.get(image_id, ())]
    write_coco(folder, source.images, captions, annotations, source.categories)
    clipped = sum(item.clipped for image_id in ids for item in source.objects.get(image_id, ()))
    counts = {"images": len(ids), "captions": len(captions), "objects": len(annotations), "clipped_boxes": clipped}
    if split == "foundation":
        return counts
    names = sorted({category["name"] for category in source.categories})
    asked = [
        (image_id, *question)
        for image_id in ids
        for question in _questions(source.objects.get(image_id, []), names, seeding.rng(seed, "questions", image_id))
    ]
    counts["questions"] = vqa.write(folder, asked, split)
    if split in EVALUATED:
        presence = {
            image["file_name"]: sorted({item.category for item in source.objects.get(image["id"], ())})
            for image in source.images
        }
        lines = pope.sample(presence, names, seeding.rng(seed, "pope", split))
        write_json_lines(folder / "pope.json", lines)
        counts["pope"] = len(lines)
    return counts


def _annotation(item: coco.CocoObject) -> dict[str, Any]:
    x0, y0, x1, y1 = item.box_xyxy
    keys = ("category_id", "segmentation", "area")
    known: dict[str, Any] = {key: item.source[key] for key in keys if key in item.source}
    if item.annotation().area is None:  # none, or no number
        known.pop("area", None)
    return {**known, "image_id": item.image_id, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": int(item.crowd)}


def _questions(
    objects: list[coco.CocoObject], names: list[str], generator: np.random.Generator
) -> list[tuple[str, str, str]]:
    """(kind, question, answer): existence, half yes and half no; counts of what is annotated one by one."""
    number = collections.Counter(item.category for item in objects)
    crowds = {item.category for item in objects if item.crowd}
    present = sorted(number)
    absent = [name for name in names if name not in number]
    made = []
    pairs = min(_QUESTIONS_PER_IMAGE // 3, len(present), len(absent))
    for name in [present[i] for i in generator.permutation(len(present))[:pairs]]:
        made.append(("exists", _exists(name), "yes"))
    for name in [absent[i] for i in generator.permutation(len(absent))[:pairs]]:
        made.append(("exists", _exists(name), "no"))
    countable = [name for name in present if name not in crowds]
    for name in [countable[i] for i in generator.permutation(len(countable))[: _QUESTIONS_PER_IMAGE // 3]]:
        made.append(("count", f"How many {plural(name)} are there?", str(number[name])))
    return made


def _exists(name: str) -> str:
    return f"Is there {'an' if name[0].lower() in 'aeiou' else 'a'} {name}?"


def plural(name: str) -> str:
    """English plural of a category name; of the last word in `wine glass`."""
    head, _, last = name.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last = last if last in ("scissors", "skis") else f"{last}es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        last = f"{last[:-1]}ies"
    else:
        last = f"{last}s"
    return f"{head} {last}".strip()
