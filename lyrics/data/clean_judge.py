"""What a web pair tells by itself, and the files in which verdicts lie between the passes of cleaning: one a shard."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from lyrics.data import files, filters
from lyrics.data.rows import read_rows, write_rows
from lyrics.data.webdataset import WebPair, read_pairs
from lyrics.errors import InputError

if TYPE_CHECKING:
    from lyrics.config import Clean

VERDICT_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "reason", "detail", "hash")]
    + [("repaired", pa.bool_()), ("width", pa.int32()), ("height", pa.int32())]
)


@dataclasses.dataclass
class Verdict:
    """What is known about one pair so far; an empty `reason` means that nothing speaks against it."""

    key: str
    caption: str
    reason: str = ""
    detail: str = ""
    hash: str = ""
    repaired: bool = False  # the caption is not the stored one, but that one in its right encoding
    width: int = 0  # in pixels; 0 where nothing can be decoded
    height: int = 0

    def drop(self, reason: str, detail: str | None) -> None:
        if detail is not None and not self.reason:
            self.reason, self.detail = reason, detail


def read_words(path: Path) -> list[str]:
    """One word or phrase a line; blank lines and those that begin with # are left out.

    Raises:
        InputError: if there is no such text file.
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is no readable list, a word a line ({error}); write one, or set clean.drop_unsafe_words=false"
        ) from None
    return [line for line in lines if line and not line.startswith("#")]


def judge(pair: WebPair, settings: "Clean", unsafe: re.Pattern[str] | None = None) -> Verdict:
    """What a pair tells by itself. Args: unsafe: finds words that no kept caption has."""
    stored = (pair.caption or "").strip()
    caption = filters.repaired(stored) if settings.repair_encodings else stored
    verdict = Verdict(key=pair.key, caption=caption, repaired=caption != stored)
    content = pair.image_bytes or b""
    try:
        image = files.decode(content)
        animated = filters.animated(content) if settings.drop_animated else None
    except files.BadImageError as error:
        verdict.drop("truncated", filters.truncated(content))
        verdict.drop("broken", str(error))
        return verdict
    verdict.width, verdict.height = image.size
    verdict.drop("animated", animated)
    verdict.drop("tiny", filters.tiny(*image.size, settings.min_side_px))
    verdict.drop("extreme", filters.extreme(*image.size, settings.max_aspect_ratio))
    verdict.drop("unsafe", filters.unsafe(caption, unsafe))
    verdict.drop("boilerplate", filters.boilerplate(caption))
    verdict.drop("length", filters.length(caption, settings.min_words, settings.max_words))
    verdict.drop("repetition", filters.repetition(caption, settings.max_repetition))
    verdict.drop("encoding", filters.encoding(caption))
    verdict.drop("language", filters.language(caption, settings.min_english_probability))
    if not verdict.reason:
        verdict.hash = filters.perceptual_hash(image)
    return verdict


def judge_shard(path: Path, tar: Path, settings: "Clean", unsafe: Sequence[str]) -> int:
    """Write what each pair of a shard tells by itself; returns how many there are."""
    pattern = filters.word_pattern(unsafe)
    return write_rows(path, (vars(judge(pair, settings, pattern)) for pair in read_pairs(tar)), VERDICT_SCHEMA)


def read_verdicts(path: Path) -> Iterator[Verdict]:
    return (Verdict(**row) for row in read_rows(path))


def write_verdicts(path: Path, verdicts: Iterable[Verdict]) -> None:
    write_rows(path, map(vars, verdicts), VERDICT_SCHEMA)
