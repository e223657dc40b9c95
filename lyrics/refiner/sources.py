"""The pictures that are refined: cleaned web pairs and the annotated splits."""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lyrics.data.annotated import read_split
from lyrics.data.disk_index import Index
from lyrics.data.records import Annotation, ImageRecord, Sample
from lyrics.data.webdataset import WebPair, read_pairs
from lyrics.errors import InputError

CLEAN, RAW = Path("data/clean"), Path("data/raw")
ANNOTATED = ("instruct", "val", "test", "test_ood")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The pictures of one split and the samples about them.

    `images` may be read once, and is not held where a split can be large. `samples` None: a caption of each picture.
    """

    name: str
    images: Iterable[ImageRecord]
    samples: Sequence[Sample] | None


def read_sources() -> Iterator[Source]:
    """The cleaned web pairs and the annotated splits that there are, one after the other.

    Raises:
        InputError: there is neither.
    """
    tars = sorted(CLEAN.glob("*.tar"))
    annotated = [RAW / name for name in ANNOTATED if (RAW / name).is_dir()]
    if not tars and not annotated:
        raise no_pictures()
    if tars:
        yield Source(name="web", images=_read_web(tars), samples=None)
    for folder in annotated:
        split = read_split(folder)
        yield Source(name=folder.name, images=split.images, samples=split.samples)


def no_pictures() -> InputError:
    return InputError(f"Neither {CLEAN} nor {RAW} has a picture to refine; make them with: python -m lyrics ingest")


def caption_sample(image: ImageRecord) -> Sample:
    return Sample(
        sample_id=f"caption-{image.image_id}",
        image_id=image.image_id,
        task="caption",
        kind="caption",
        references=image.captions,
    )


def _read_web(tars: Sequence[Path]) -> Iterator[ImageRecord]:
    """Every pair; at the end keys are known to be unique."""
    repeated: dict[str, None] = {}
    with contextlib.closing(Index()) as keys:
        for tar in tars:
            for pair in read_pairs(tar):
                if not keys.add(pair.key):
                    repeated[pair.key] = None
                yield _web_record(tar, pair)
    if repeated:
        raise InputError(
            f"{CLEAN} has {len(repeated)} keys more than once, first {next(iter(repeated))}; keys must be unique"
        )


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
