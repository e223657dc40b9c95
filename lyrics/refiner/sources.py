"""The pictures that are refined: cleaned web pairs and the annotated splits."""

import array
import collections
import dataclasses
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lyrics.data.annotated import read_split
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
    """Every pair; at the end keys are known to be unique. Of each, eight bytes are held for that."""
    hashes = array.array("Q")
    for tar in tars:
        for pair in read_pairs(tar):
            hashes.append(_hash(pair.key))
            yield _web_record(tar, pair)
    ordered = np.sort(np.frombuffer(hashes, np.uint64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if suspects:
        keys = (pair.key for tar in tars for pair in read_pairs(tar))
        counts = collections.Counter(key for key in keys if _hash(key) in suspects)
        repeated = [key for key, count in counts.items() if count > 1]
        if repeated:
            raise InputError(
                f"{CLEAN} has {len(repeated)} keys more than once, first {repeated[0]}; keys must be unique"
            )


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


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
