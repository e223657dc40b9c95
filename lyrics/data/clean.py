"""Clean (pipeline stage): drop web pairs that teach nothing or teach wrongly, each with its reason.

00000.tar …     the kept pairs, as img2dataset lays them out
ledger.parquet  one row a pair, kept or not: key, shard, kept, reason, detail, whether its caption was repaired
report.json     counts, examples and, where the truth is known, precision and recall

Filters run in the order of `clean_report.REASONS` and the first that objects names the reason. Pictures that look like
one of a split that measures have leaked from it; these and duplicates are sought among the pairs that passed every
earlier filter, mismatches among what is then left.
"""

import dataclasses
import itertools
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from lyrics import io
from lyrics.data import clean_report, files, filters
from lyrics.data.formats import ABSENT
from lyrics.data.pictures import EVALUATED
from lyrics.data.webdataset import WebPair, read_pairs, write_tar
from lyrics.errors import InputError

if TYPE_CHECKING:
    from lyrics.config import Clean, Config
    from lyrics.stage import Tracker

RAW = Path("data/raw")
WEB = RAW / "web"
UNSAFE_WORDS = Path("params/unsafe_words.txt")
TRUTH = RAW / "web_truth.parquet"
CLIP = Path("models/foundation/clip")
MIN_COMPARED = 20  # with fewer other captions a rank says too little to drop a pair
_BATCH = 64

_LEDGER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.string()),
        ("kept", pa.bool_()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("repaired", pa.bool_()),
    ]
)
_HELD_OUT_SCHEMA = pa.schema([("name", pa.string()), ("hash", pa.string())])
_VERDICT_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "caption", "reason", "detail", "hash")] + [("repaired", pa.bool_())]
)


class Encoder(Protocol):
    """The part of an image–text model that judges a pair: arrays or tensors, a row of length 1 for each item."""

    def encode_images(self, images: Sequence[Image.Image], /) -> Any: ...
    def encode_texts(self, texts: Sequence[str], /) -> Any: ...


@dataclasses.dataclass
class Verdict:
    """What is known about one pair so far; an empty `reason` means that nothing speaks against it."""

    key: str
    caption: str
    reason: str = ""
    detail: str = ""
    hash: str = ""
    repaired: bool = False  # the caption is not the stored one, but that one in its right encoding

    def drop(self, reason: str, detail: str | None) -> None:
        if detail is not None and not self.reason:
            self.reason, self.detail = reason, detail


def run(config: "Config", work: Path, tracker: "Tracker") -> None:
    shards = sorted(WEB.glob("*.tar"))
    if not shards and not (WEB / ABSENT).exists():
        raise InputError(f"{WEB} holds no .tar with pairs; make them with: python -m lyrics ingest")
    unsafe = read_words(UNSAFE_WORDS) if config.clean.drop_unsafe_words else []
    encoder = _load_encoder(config)
    started = time.perf_counter()
    ledger, report = clean(shards, config.clean, encoder, work, unsafe)
    seconds = time.perf_counter() - started
    if TRUTH.exists():  # read only now: every decision is made
        report["score"] = clean_report.score(ledger, clean_report.read_truth(TRUTH))
    out = work / "out"
    out.mkdir(exist_ok=True)
    for tar in sorted((work / "kept").glob("*")):
        io.link_or_copy(tar, out / tar.name)
    _write(out / "ledger.parquet", ledger, _LEDGER_SCHEMA)
    io.write_json(out / "report.json", report)
    tracker.log_metrics(clean_report.metrics(report) | {"clean/pairs_per_s": len(ledger) / max(seconds, 1e-9)})
    tracker.log_artifact(out / "report.json")


def clean(
    shards: Sequence[Path], settings: "Clean", encoder: Encoder | None, work: Path, unsafe: Sequence[str] = ()
) -> tuple[list[dict], dict]:
    """Judge all pairs and write the kept ones to `work/kept`; a shard that an earlier run finished is not done again.

    Args:
        encoder: None where there is no image–text model: mismatches are then not checked, and counted so.
        unsafe: words and phrases that no kept caption has.

    Returns:
        The ledger's rows and the report.
    """
    judged = {
        tar: _judge_shard(work / "judged" / f"{tar.stem}.parquet", tar, settings, unsafe)
        for tar in tqdm(shards, "clean: pictures and captions")
    }
    index = filters.DuplicateIndex(settings.duplicate_hamming_bits)
    held_out = _add_held_out(index, work / "held_out.parquet")
    mark_duplicates((verdict for tar in shards for verdict in judged[tar]), index)
    not_checked = 0
    for tar in tqdm(shards, "clean: picture against caption"):
        left = [verdict for verdict in judged[tar] if not verdict.reason]
        if encoder is None or settings.max_better_captions is None or len(left) <= MIN_COMPARED:
            not_checked += len(left)
            continue
        shares = _better_shares(work / "matched" / f"{tar.stem}.parquet", tar, judged[tar], encoder)
        for verdict, share in zip(left, shares, strict=True):
            verdict.drop("mismatched", filters.mismatched(share, settings.max_better_captions))
    for tar in shards:
        destination = work / "kept" / tar.name
        if not destination.with_suffix(".parquet").exists():  # written after the tar
            write_tar(destination, _undropped(tar, judged[tar]))
    ledger = [
        {"key": v.key, "shard": tar.name, "kept": not v.reason, "reason": v.reason, "detail": v.detail}
        | {"repaired": v.repaired}
        for tar in shards
        for v in judged[tar]
    ]
    captions = [v.caption for tar in shards for v in judged[tar]]
    return ledger, clean_report.summary(ledger, captions, {"mismatched": not_checked}) | {"held_out": held_out}


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


def mark_duplicates(verdicts: Iterable[Verdict], index: filters.DuplicateIndex) -> None:
    """Of pictures that look alike the first in file order stays, and none that looks like one already in the index."""
    held_out = len(index)
    for verdict in verdicts:
        if verdict.reason:
            continue
        original = index.find(verdict.hash)
        if original is None:
            index.add(verdict.key, verdict.hash)
        else:
            verdict.drop("leaked" if original < held_out else "duplicate", f"of {index.name(original)}")


def _add_held_out(index: filters.DuplicateIndex, path: Path) -> dict[str, int]:
    """Put the pictures of the splits that measure into the index; how many each has. Remembered in `path`."""
    if not path.exists():
        rows = ({"name": name, "hash": filters.perceptual_hash(image)} for name, image in _held_out_pictures())
        _write(path, list(rows), _HELD_OUT_SCHEMA)
    counts = dict.fromkeys(EVALUATED, 0)
    for row in pq.read_table(path).to_pylist():
        index.add(row["name"], row["hash"])
        counts[row["name"].partition("/")[0]] += 1
    return counts


def _held_out_pictures() -> Iterator[tuple[str, Image.Image]]:
    names = [path for split in EVALUATED for path in sorted((RAW / split / "images").glob("*"))]
    for path in tqdm(names, "clean: pictures of val and test"):
        try:
            yield f"{path.parent.parent.name}/{path.name}", files.decode(path)
        except files.BadImageError as error:
            raise InputError(f"{path} cannot be compared with the web: {error}; make it again with: ingest") from None


def _load_encoder(config: "Config") -> Encoder | None:
    if config.clean.max_better_captions is None:
        return None
    from lyrics.foundation import clip, training

    return clip.load_clip(CLIP, str(training.pick_device(config.device))) if clip.has_text_tower(CLIP) else None


def _undropped(tar: Path, verdicts: Sequence[Verdict]) -> Iterator[WebPair]:
    """The pairs of a shard that are still in, with their captions in the right encoding."""
    for pair, verdict in zip(read_pairs(tar), verdicts, strict=True):
        if not verdict.reason:
            yield dataclasses.replace(pair, caption=verdict.caption) if verdict.repaired else pair


def _judge_shard(path: Path, tar: Path, settings: "Clean", unsafe: Sequence[str]) -> list[Verdict]:
    """What each pair of a shard tells by itself; remembered in `path`."""
    if not path.exists():
        pattern = filters.word_pattern(unsafe)
        _write(path, [vars(judge(pair, settings, pattern)) for pair in read_pairs(tar)], _VERDICT_SCHEMA)
    return [Verdict(**row) for row in pq.read_table(path).to_pylist()]


def _better_shares(path: Path, tar: Path, verdicts: Sequence[Verdict], encoder: Encoder) -> list[float]:
    """For each pair still in, the share of its shard's other captions that fit better; remembered in `path`."""
    if not path.exists():
        pairs = _undropped(tar, verdicts)
        images, texts = [], []
        while batch := list(itertools.islice(pairs, _BATCH)):
            images.append(encoder.encode_images([files.decode(pair.image_bytes or b"") for pair in batch]))
            texts.append(encoder.encode_texts([(pair.caption or "").strip() for pair in batch]))
        shares = filters.better_captions(_stack(images), _stack(texts))
        _write(path, [{"share": float(share)} for share in shares], pa.schema([("share", pa.float64())]))
    return [row["share"] for row in pq.read_table(path).to_pylist()]


def _stack(batches: list[Any]) -> np.ndarray:
    """Arrays or tensors, as one float32 array."""
    return np.concatenate([np.asarray(batch, np.float32) for batch in batches])


def _write(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    with io.atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary)
