"""`lyrics inspect`: refined data as a static gallery: an index, a page for each shard, thumbnails beside.

Rows are read a group at a time and a shard's page is written from its own, so memory does not grow with the data.
"""

import collections
import dataclasses
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image
from tqdm import tqdm

from lyrics import io
from lyrics.data.files import BadImageError
from lyrics.data.webdataset import open_image
from lyrics.drawing import object_colour
from lyrics.errors import InputError
from lyrics.evaluate.pictures import outline
from lyrics.pages import template
from lyrics.refiner import features
from lyrics.refiner.features import RefinedImage

INDEX = "index.html"
_MARK = "gallery.json"  # a folder with it is a gallery, and may be replaced by the next
_HERE = Path(__file__).parent
_THUMBNAIL_PX = 320
_QUALITY = 80
_OUTLINE_POINTS = 48  # a card is small, and ten thousand share a page
_INDEX_TAGS = 12
_INDEX_PICTURES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Object:
    """`box_percent`: left, top, width and height in percent of the picture; `outline`: an SVG path in its pixels."""

    tag: str
    score: float
    box_percent: tuple[float, float, float, float]
    outline: str
    colour: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One picture; without `thumbnail` it could not be opened, for `fault`."""

    image: RefinedImage
    objects: list[Object]
    thumbnail: str
    fault: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What the index tells of a shard."""

    href: str
    name: str
    images: int
    objects: int
    empty: int
    tags: list[tuple[str, int]]
    thumbnails: list[str]


@dataclasses.dataclass(frozen=True)
class Gallery:
    index: Path
    images: int
    missing: int


def inspect(refined: Path, out: Path, splits: Sequence[str] = ()) -> Gallery:
    """Write a gallery of `splits`, or of all, into `out`; an older gallery there is replaced when this one is whole.

    Raises:
        InputError: `refined` is no refined data or lacks a split, or `out` holds something else than a gallery.
    """
    chosen = _splits(refined, splits)
    _check_out(out, refined)
    counts = {name: features.count_rows(refined / name / features.IMAGES_FILE) for name in chosen}
    building = out.with_name(f".{out.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for file_name in ("inspect.css", "inspect.js"):
        shutil.copyfile(_HERE / file_name, building / file_name)
    missing = 0
    pages: dict[str, list[Page]] = {}
    with tqdm(total=sum(counts.values()), desc="inspect", unit="image") as progress:
        for name in chosen:
            pages[name] = []
            rows = features.stream_images(refined / name / features.IMAGES_FILE)
            for shard, group in itertools.groupby(rows, key=lambda image: image.shard):
                page, faults = _write_page(building, name, shard, list(group), progress)
                pages[name].append(page)
                missing += faults
    text = template(_HERE / "inspect_index.html").render(refined=refined, splits=pages, counts=counts, missing=missing)
    io.write_text(building / INDEX, text)
    io.write_json(building / _MARK, {"images": counts, "missing": missing})
    out.parent.mkdir(parents=True, exist_ok=True)
    io.publish(building, out)
    return Gallery(out / INDEX, sum(counts.values()), missing)


def _splits(refined: Path, asked: Sequence[str]) -> list[str]:
    if not refined.is_dir():
        raise InputError(f"{refined} is not a folder; give the one that `refine` wrote, as a rule data/refined")
    found = sorted(path.parent.name for path in refined.glob(f"*/{features.IMAGES_FILE}"))
    if not found:
        raise InputError(
            f"{refined} has no split with {features.IMAGES_FILE}; give the folder that holds them, as a rule "
            "data/refined, or make it with: python -m lyrics refine"
        )
    if unknown := sorted(set(asked) - set(found)):
        raise InputError(f"{refined} has no split {', '.join(unknown)}; it has {', '.join(found)}")
    return [name for name in found if not asked or name in asked]


def _check_out(out: Path, refined: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder")
    if out.resolve() == refined.resolve() or (out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists()):
        raise InputError(f"--out {out} holds something else than a gallery; give a new folder, it would be replaced")


def _write_page(
    building: Path, split: str, shard: int, images: Sequence[RefinedImage], progress: tqdm
) -> tuple[Page, int]:
    """The page of one shard and its thumbnails; also how many pictures could not be opened."""
    name = features.shard_folder(Path(split), shard).as_posix()
    thumbnails = Path("thumbnails") / name
    (building / thumbnails).mkdir(parents=True)
    tags = collections.Counter(tag for image in images for tag in set(image.tags))
    cards: list[Card] = []
    first: list[str] = []
    faults = 0
    for row, image in enumerate(images):
        card = _card(image, building, thumbnails / f"{row:06d}.jpg")
        faults += not card.thumbnail
        if card.thumbnail and len(first) < _INDEX_PICTURES:
            first.append(card.thumbnail)
        cards.append(card)
        progress.update()
    href = f"{split}-{shard:05d}.html"
    most = max((len(image.tags) for image in images), default=0)
    _stream(
        template(_HERE / "inspect.html"),
        {"name": name, "split": split, "cards": cards, "tags": sorted(tags.items()), "most": most, "index": INDEX},
        building / href,
    )
    page = Page(
        href=href,
        name=name,
        images=len(images),
        objects=sum(len(image.tags) for image in images),
        empty=sum(not image.tags for image in images),
        tags=tags.most_common(_INDEX_TAGS),
        thumbnails=first,
    )
    return page, faults


def _card(image: RefinedImage, building: Path, thumbnail: Path) -> Card:
    fault = ""
    try:
        picture = open_image(image.path)
        picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.LANCZOS)
        picture.save(building / thumbnail, "JPEG", quality=_QUALITY)
    except (InputError, BadImageError) as error:
        fault = str(error)
    return Card(
        image=image,
        objects=list(_objects(image)),
        thumbnail="" if fault else thumbnail.as_posix(),
        fault=fault,
    )


def _objects(image: RefinedImage) -> Iterator[Object]:
    found = zip(image.tags, image.scores, image.boxes_xyxy, image.masks, strict=True)
    for number, (tag, score, (x0, y0, x1, y1), counts) in enumerate(found):
        across, down = 100 / image.width, 100 / image.height
        yield Object(
            tag=tag,
            score=score,
            box_percent=(x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down),
            outline=outline(counts, image.width, image.height, _OUTLINE_POINTS),
            colour="#{:02x}{:02x}{:02x}".format(*object_colour(number)),
        )


def _stream(page: jinja2.Template, values: dict[str, Any], path: Path) -> None:
    """Written piece by piece: the page of ten thousand pictures is never held as one text."""
    pieces: Iterable[str] = page.generate(**values)
    with io.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", errors="replace") as opened:
        opened.writelines(pieces)
        opened.flush()
        os.fsync(opened.fileno())
