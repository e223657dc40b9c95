"""Clean (pipeline stage): drop web pairs that teach nothing or teach wrongly, each with its reason.

00000.tar …     the kept pairs, as img2dataset lays them out
ledger.parquet  one row a pair, kept or not: key, shard, kept, reason, detail, whether its caption was repaired
report.json     counts, examples, distributions and, where the truth is known, precision and recall
report.html     the same to look at

Filters run in the order of `clean_report.REASONS` and the first that objects names the reason. Pictures that look like
one of a split that measures have leaked from it; these and duplicates are sought among the pairs that passed every
earlier filter, mismatches among what is then left.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from lyrics import engine, io
from lyrics.data import clean_page, clean_report, files, filters
from lyrics.data.clean_judge import Verdict, judge_shard, read_verdicts, read_words, write_verdicts
from lyrics.data.formats import ABSENT
from lyrics.data.pictures import EVALUATED
from lyrics.data.rows import read_rows, write_rows
from lyrics.data.webdataset import WebPair, read_pairs, write_tar
from lyrics.errors import InputError

if TYPE_CHECKING:
    from lyrics.config import Clean, Config, Engine
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


class Encoder(Protocol):
    """The part of an image–text model that judges a pair: arrays or tensors, a row of length 1 for each item."""

    def encode_images(self, images: Sequence[Image.Image], /) -> Any: ...
    def encode_texts(self, texts: Sequence[str], /) -> Any: ...


def run(config: "Config", work: Path, tracker: "Tracker") -> None:
    shards = sorted(WEB.glob("*.tar"))
    if not shards and not (WEB / ABSENT).exists():
        raise InputError(f"{WEB} holds no .tar with pairs; make them with: python -m lyrics ingest")
    unsafe = read_words(UNSAFE_WORDS) if config.clean.drop_unsafe_words else []
    load_encoder = functools.partial(_load_encoder, config.clean.max_better_captions, config.device)
    started = time.perf_counter()
    report = clean(shards, config.clean, load_encoder, work, unsafe, config.engine, tracker)
    seconds = time.perf_counter() - started
    if TRUTH.exists():  # read only now: every decision is made
        report["score"] = clean_report.score(ledger(shards, work), clean_report.read_truth(TRUTH))
    out = work / "out"
    out.mkdir(exist_ok=True)
    for tar in sorted((work / "kept").glob("*")):
        io.link_or_copy(tar, out / tar.name)
    write_rows(out / "ledger.parquet", ledger(shards, work), _LEDGER_SCHEMA)
    io.write_json(out / "report.json", report)
    io.write_text(out / "report.html", clean_page.render(report, clean_page.thumbnails(shards, report["examples"])))
    tracker.log_metrics(clean_report.metrics(report) | {"clean/pairs_per_s": report["pairs"] / max(seconds, 1e-9)})
    tracker.log_artifact(out / "report.json")
    tracker.log_artifact(out / "report.html")


def clean(
    shards: Sequence[Path],
    settings: "Clean",
    load_encoder: Callable[[], Encoder | None],
    work: Path,
    unsafe: Sequence[str],
    by: "Engine",
    tracker: "Tracker",
) -> dict[str, Any]:
    """Judge all pairs and write the kept ones to `work/kept`; a shard that an earlier run finished is not done again.

    Every pass goes from one file a shard to the next and holds a part of a shard (for matching, the embeddings of one);
    of all pictures only the index of duplicates knows something, some 160 bytes each. That pass is the driver's, since
    it needs all shards in order; the others are done by an engine's workers.

    Args:
        load_encoder: called in each worker; gives None where there is no image–text model: mismatches are then not
            checked, and counted so. Picklable.
        unsafe: words and phrases that no kept caption has.
        by: the engine.

    Returns:
        The report.
    """

    def each(name: str, load: Callable[[], Callable[[Path], int]], done: Callable[[Path], bool]) -> None:
        engine.run_shards(by, load, shards, done=done, name=f"clean/{name}", tracker=tracker)

    def written(folder: str) -> Callable[[Path], bool]:
        return lambda tar: _of(tar, work, folder).exists()

    each("judge", functools.partial(_judging, work, settings, unsafe), written("judged"))
    held_out = _find_copies(shards, work, settings.duplicate_hamming_bits)
    each("match", functools.partial(_matching, work, load_encoder, settings.max_better_captions), written("final"))
    each("keep", functools.partial(_keeping, work), written("kept"))  # its table is written after the tar
    not_checked = sum(_left(_of(tar, work, "unique")) for tar in shards if not _of(tar, work, "matched").exists())
    report = clean_report.summary(ledger(shards, work), {"mismatched": not_checked})
    return report | {"held_out": held_out}


def _judging(work: Path, settings: "Clean", unsafe: Sequence[str]) -> Callable[[Path], int]:
    """What a worker begins the first pass with; like the other two, it gives a function that does one shard."""
    return lambda tar: judge_shard(_of(tar, work, "judged"), tar, settings, unsafe)


def _matching(
    work: Path, load_encoder: Callable[[], Encoder | None], max_better_captions: float | None
) -> Callable[[Path], int]:
    encoder = load_encoder()
    return lambda tar: _match_shard(tar, work, encoder, max_better_captions)


def _keeping(work: Path) -> Callable[[Path], int]:
    return lambda tar: write_tar(work / "kept" / tar.name, _undropped(tar, _of(tar, work, "final")))


def ledger(shards: Sequence[Path], work: Path) -> Iterator[dict[str, Any]]:
    """One row a pair in file order, as it lies in ledger.parquet, with its caption and size."""
    for tar in shards:
        for v in read_verdicts(_of(tar, work, "final")):
            known = {"key": v.key, "shard": tar.name, "kept": not v.reason, "reason": v.reason, "detail": v.detail}
            yield {**known, "repaired": v.repaired, "caption": v.caption, "width": v.width, "height": v.height}


def _of(tar: Path, work: Path, folder: str) -> Path:
    return work / folder / f"{tar.stem}.parquet"


def _find_copies(shards: Sequence[Path], work: Path, max_bits: int) -> dict[str, int]:
    """From `judged` to `unique`, with leaks and duplicates dropped; how many pictures each split that measures has.

    What is a duplicate depends on every earlier shard, so a pass that was stopped begins anew: it reads no picture.
    """
    index = filters.DuplicateIndex(max_bits)
    held_out = _add_held_out(index, work / "held_out.parquet")
    if not all(_of(tar, work, "unique").exists() for tar in shards):
        first = len(index)
        for tar in tqdm(shards, "clean: duplicates"):
            verdicts = read_verdicts(_of(tar, work, "judged"))
            write_verdicts(_of(tar, work, "unique"), mark_copies(verdicts, index, first))
    return held_out


def mark_copies(verdicts: Iterable[Verdict], index: filters.DuplicateIndex, held_out: int) -> Iterator[Verdict]:
    """Of pictures that look alike the first stays; none that looks like one of the first `held_out` in the index."""
    for verdict in verdicts:
        if not verdict.reason:
            original = index.find(verdict.hash)
            if original is None:
                index.add(verdict.key, verdict.hash)
            else:
                verdict.drop("leaked" if original < held_out else "duplicate", f"of {index.name(original)}")
        yield verdict


def _add_held_out(index: filters.DuplicateIndex, path: Path) -> dict[str, int]:
    """Put the pictures of the splits that measure into the index; how many each has. Remembered in `path`."""
    if not path.exists():
        rows = ({"name": name, "hash": filters.perceptual_hash(image)} for name, image in _held_out_pictures())
        write_rows(path, rows, _HELD_OUT_SCHEMA)
    counts = dict.fromkeys(EVALUATED, 0)
    for row in read_rows(path):
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


def _load_encoder(max_better_captions: float | None, device: str) -> Encoder | None:
    if max_better_captions is None:
        return None
    from lyrics.foundation import clip, training

    return clip.load_clip(CLIP, str(training.pick_device(device))) if clip.has_text_tower(CLIP) else None


def _match_shard(tar: Path, work: Path, encoder: Encoder | None, max_better_captions: float | None) -> int:
    """From `unique` to `final`, with mismatches dropped; how many pairs were still in."""
    unique = _of(tar, work, "unique")
    left, verdicts = _left(unique), read_verdicts(unique)
    if encoder is not None and max_better_captions is not None and left > MIN_COMPARED:
        shares = iter(_better_shares(_of(tar, work, "matched"), tar, unique, encoder))
        verdicts = mark_mismatches(verdicts, shares, max_better_captions)
    write_verdicts(_of(tar, work, "final"), verdicts)
    return left


def _left(verdicts: Path) -> int:
    return sum(not verdict.reason for verdict in read_verdicts(verdicts))


def mark_mismatches(verdicts: Iterable[Verdict], shares: Iterator[float], limit: float) -> Iterator[Verdict]:
    """Args: shares: of better captions, one for each pair that is still in."""
    for verdict in verdicts:
        if not verdict.reason:
            verdict.drop("mismatched", filters.mismatched(next(shares), limit))
        yield verdict


def _undropped(tar: Path, verdicts: Path) -> Iterator[WebPair]:
    """The pairs of a shard that are still in, with their captions in the right encoding."""
    for pair, verdict in zip(read_pairs(tar), read_verdicts(verdicts), strict=True):
        if not verdict.reason:
            yield dataclasses.replace(pair, caption=verdict.caption) if verdict.repaired else pair


def _better_shares(path: Path, tar: Path, verdicts: Path, encoder: Encoder) -> list[float]:
    """For each pair still in, the share of its shard's other captions that fit better; remembered in `path`."""
    if not path.exists():
        pairs = _undropped(tar, verdicts)
        images, texts = [], []
        while batch := list(itertools.islice(pairs, _BATCH)):
            images.append(encoder.encode_images([files.decode(pair.image_bytes or b"") for pair in batch]))
            texts.append(encoder.encode_texts([(pair.caption or "").strip() for pair in batch]))
        shares = filters.better_captions(_stack(images), _stack(texts))
        write_rows(path, ({"share": float(share)} for share in shares), pa.schema([("share", pa.float64())]))
    return [row["share"] for row in read_rows(path)]


def _stack(batches: list[Any]) -> np.ndarray:
    """Arrays or tensors, as one float32 array."""
    return np.concatenate([np.asarray(batch, np.float32) for batch in batches])
