"""The pictures that are refined: cleaned web pairs and the annotated splits."""

import collections
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lyrics.data.annotated import read_split
from lyrics.data.records import Annotation, ImageRecord, Sample
from lyrics.data.webdataset import WebPair, read_pairs
from lyrics.errors import InputError

CLEAN, RAW = Path("data/clean"), Path("data/raw")
ANNOTATED = ("instruct", "val", "test", "test_ood")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The pictures of one split and the samples about them."""

    name: str
    images: list[ImageRecord]
    samples: list[Sample]


def read_sources() -> list[Source]:
    """The cleaned web pairs and the annotated splits that there are.

    Raises:
        InputError: there is neither.
    """
    sources = [_read_web(sorted(CLEAN.glob("*.tar")))] if any(CLEAN.glob("*.tar")) else []
    for name in ANNOTATED:
        if (RAW / name).is_dir():
            split = read_split(RAW / name)
            sources.append(Source(name=name, images=split.images, samples=split.samples))
    if not any(source.images for source in sources):
        raise InputError(f"Neither {CLEAN} nor {RAW} has a picture to refine; make them with: python -m lyrics ingest")
    return sources


def _read_web(tars: Sequence[Path]) -> Source:
    """One picture and one caption sample a pair."""
    images = [_web_record(tar, pair) for tar in tars for pair in read_pairs(tar)]
    repeated = [key for key, count in collections.Counter(image.image_id for image in images).items() if count > 1]
    if repeated:
        raise InputError(f"{CLEAN} has {len(repeated)} keys more than once, first {repeated[0]}; keys must be unique")
    samples = [
        Sample(
            sample_id=f"caption-{image.image_id}",
            image_id=image.image_id,
            task="caption",
            kind="caption",
            references=image.captions,
        )
        for image in images
    ]
    return Source(name="web", images=images, samples=samples)


def _web_record(tar: Path, pair: WebPair) -> ImageRecord:
    with Image.open(io.BytesIO(pair.image_bytes or b"")) as image:
        width, height = image.size
    return ImageRecord(
        image_id=pair.key,
        path=f"{tar.as_posix()}::{pair.key}.{pair.suffix}",
        width=width,
        height=height,
        captions=((pair.caption or "").strip(),),
        annotations=tuple(map(_annotation, pair.meta.get("annotations", ()))),
    )


def _annotation(value: dict[str, Any]) -> Annotation:
    """Of a pair's metadata: {category, bbox as x, y, width, height, rle}."""
    x, y, width, height = value["bbox"]
    return Annotation(category=value["category"], box_xyxy=(x, y, x + width, y + height), rle=value.get("rle"))
