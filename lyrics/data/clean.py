"""Clean (pipeline stage): drop web pairs that teach nothing or teach wrongly, each with its reason.

00000.tar …     the kept pairs, as img2dataset lays them out
ledger.parquet  one row a pair, kept or not: key, shard, kept, reason, detail, whether its caption was repaired
report.json     counts, examples, distributions and, where the truth is known, precision and recall
report.html     the same to look at

Filters run in the order of `clean_report.REASONS` and the first that objects names the reason. Pictures that look like
one of a split that measures have leaked from it; these and duplicates are sought among the pairs that passed every
earlier filter, mismatches among what is then left, and at last pictures whose embeddings are close.
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
from lyrics.data import clean_page, clean_report, files, filters, look_alikes
from lyrics.data.clean_judge import Verdict, judge_shard, read_verdicts, read_words, write_verdicts
from lyrics.data.formats import ABSENT
from lyrics.data.held_out import EVALUATED
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
    load_encoder = functools.partial(_load_encoder, config.clean, config.device)
    started = time.perf_counter()
    report = clean(shards, config.clean, load_encoder, work, unsafe, config.engine, tracker)
    seconds = time.perf_counter() - started
    if TRUTH.exists():  # read only now: every decision is made
        report["score"] = clean_report.score(ledger(shards, work), clean_report.read_truth(TRUTH))
    out = work / "out"
    out.mkdir(exist_ok=True)
    for tar in sorted((work / "kept").glob("[!.]*")):  # a killed worker leaves a part of one under a hidden name
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
    of all pictures only the indices of duplicates and look-alikes know something, some 160 bytes each. Those passes are
    the driver's, since they need all shards in order; the others are done by an engine's workers.

    Args:
        load_encoder: called in each worker; gives None where there is no image–text model: mismatches are then not
            checked, and counted so. Picklable.
        unsafe: words and phrases that no kept caption has.
        by: the engine.

    Returns:
        The report.
    """

    def each(
        name: str, load: Callable[[], Callable[[Path], int]], done: Callable[[Path], bool], of: Sequence[Path] = shards
    ) -> None:
        engine.run_shards(by, load, of, done=done, name=f"clean/{name}", tracker=tracker)

    def written(folder: str) -> Callable[[Path], bool]:
        return lambda tar: _of(tar, work, folder).exists()

    each("judge", functools.partial(_judging, work, settings, unsafe), written("judged"))
    held_out = _find_copies(shards, work, settings.duplicate_hamming_bits)

    def embedded(source: Path) -> bool:
        return _embedded(source, work).exists()

    matching = functools.partial(_matching, work, load_encoder, settings)
    if settings.look_alike_cosine is None:
        each("match", matching, written("final"))
    else:
        each("match", matching, written("fitting"))
        measuring = [RAW / split for split in EVALUATED if (RAW / split / "images").is_dir()]
        each("val and test", functools.partial(_embedding, work, load_encoder), embedded, measuring)
        _find_look_alikes(shards, measuring, work, settings.look_alike_cosine)
    each("keep", functools.partial(_keeping, work), written("kept"))  # its table is written after the tar
    report = clean_report.summary(ledger(shards, work), _not_checked(shards, work, settings))
    return report | {"held_out": held_out}


def _judging(work: Path, settings: "Clean", unsafe: Sequence[str]) -> Callable[[Path], int]:
    """What a worker begins the first pass with; like the other two, it gives a function that does one shard."""
    return lambda tar: judge_shard(_of(tar, work, "judged"), tar, settings, unsafe)


def _matching(work: Path, load_encoder: Callable[[], Encoder | None], settings: "Clean") -> Callable[[Path], int]:
    encoder = load_encoder()
    return lambda tar: _match_shard(tar, work, encoder, settings)


def _embedding(work: Path, load_encoder: Callable[[], Encoder | None]) -> Callable[[Path], int]:
    encoder = load_encoder()
    return lambda split: _embed_split(split, work, encoder)


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


def _embedded(source: Path, work: Path) -> Path:
    """Embeddings of the pairs of a tar, or of the pictures of a split."""
    return work / "embedded" / f"{source.name}.npz"


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


def _held_out_pictures(splits: Iterable[str] = EVALUATED) -> Iterator[tuple[str, Image.Image]]:
    folders = [(split, RAW / split / "images") for split in splits]
    found = [(split, folder, path) for split, folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    for split, folder, path in tqdm(found, "clean: pictures of val and test"):
        try:
            yield f"{split}/{path.relative_to(folder).as_posix()}", files.decode(path)
        except files.BadImageError as error:
            raise InputError(f"{path} cannot be compared with the web: {error}; make it again with: ingest") from None


def _load_encoder(settings: "Clean", device: str) -> Encoder | None:
    if settings.max_better_captions is None and settings.look_alike_cosine is None:
        return None
    from lyrics.foundation import clip, training

    return clip.load_clip(CLIP, str(training.pick_device(device))) if clip.has_text_tower(CLIP) else None


def _match_shard(tar: Path, work: Path, encoder: Encoder | None, settings: "Clean") -> int:
    """From `unique` on, with mismatches dropped; how many pairs were still in."""
    unique = _of(tar, work, "unique")
    left, verdicts = _left(unique), read_verdicts(unique)
    if encoder is not None and left:
        image_NE, text_NE = _embed_shard(_embedded(tar, work), tar, unique, encoder)
        if settings.max_better_captions is not None and left > MIN_COMPARED:
            shares = iter(filters.better_captions(image_NE, text_NE).tolist())
            verdicts = mark_mismatches(verdicts, shares, settings.max_better_captions)
    write_verdicts(_of(tar, work, "final" if settings.look_alike_cosine is None else "fitting"), verdicts)
    return left


def _left(verdicts: Path) -> int:
    return sum(not verdict.reason for verdict in read_verdicts(verdicts))


def _not_checked(shards: Sequence[Path], work: Path, settings: "Clean") -> dict[str, int]:
    """Pairs that reached a filter which could not judge them: without an image–text model, or among too few others."""
    left = {tar: _left(_of(tar, work, "unique")) for tar in shards}
    embedded = {tar for tar in shards if _embedded(tar, work).exists()}
    matched = embedded if settings.max_better_captions is not None else set()
    counts = {"mismatched": sum(n for tar, n in left.items() if tar not in matched or n <= MIN_COMPARED)}
    if settings.look_alike_cosine is not None:
        counts["look_alike"] = sum(n for tar, n in left.items() if tar not in embedded)
    return counts


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


def _embed_shard(path: Path, tar: Path, verdicts: Path, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, E) of the pictures and captions of the pairs that are still in; remembered in `path`."""
    if not path.exists():
        pairs = _undropped(tar, verdicts)
        names, images, texts = [], [], []
        while batch := list(itertools.islice(pairs, _BATCH)):
            names += [pair.key for pair in batch]
            images.append(encoder.encode_images([files.decode(pair.image_bytes or b"") for pair in batch]))
            texts.append(encoder.encode_texts([(pair.caption or "").strip() for pair in batch]))
        look_alikes.write_embeddings(path, names, _stack(images), _stack(texts))
    return look_alikes.read_embeddings(path)[1:]


def _embed_split(split: Path, work: Path, encoder: Encoder | None) -> int:
    """Embeddings of the pictures of a split that measures; none without an image–text model."""
    names, images = [], []
    pictures = _held_out_pictures([split.name]) if encoder is not None else iter(())
    while batch := list(itertools.islice(pictures, _BATCH)):
        names += [name for name, _ in batch]
        images.append(encoder.encode_images([image for _, image in batch]))  # type: ignore[union-attr]
    look_alikes.write_embeddings(_embedded(split, work), names, _stack(images), np.zeros((0, 0), np.float32))
    return len(names)


def _find_look_alikes(shards: Sequence[Path], measuring: Sequence[Path], work: Path, min_cosine: float) -> None:
    """From `fitting` to `final`; begun anew where it was stopped."""
    if all(_of(tar, work, "final").exists() for tar in shards):
        return
    files_of = [(_of(tar, work, "fitting"), _embedded(tar, work), _of(tar, work, "final")) for tar in shards]
    with (work / "look_alikes.bin").open("wb+", buffering=0) as file:
        look_alikes.find_look_alikes(files_of, [_embedded(split, work) for split in measuring], min_cosine, file)


def _stack(batches: list[Any]) -> np.ndarray:
    """Arrays or tensors, as one float32 array."""
    return np.concatenate([np.asarray(batch, np.float32) for batch in batches or [np.zeros((0, 0))]])
