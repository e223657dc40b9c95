"""Features as `refine` keeps them, fp16, bf16 and int8: reading them at random, their part in a step, what each loses.

    make run && python -m benchmarks.features --write docs/benchmarks.md

After `make run until=refine` all but the scores is measured. Each of the three gets a copy of data/refined below
build/, converted by the writer that `refine` has; the copy in fp16 must be the stored bytes. Readers take turns, round
by round, so that a busy machine slows all of them.
"""

import argparse
import collections
import dataclasses
import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from benchmarks import features_quality, features_steps
from benchmarks.features_quality import Errors, Scored
from benchmarks.features_steps import Steps
from benchmarks.stage1 import cpu_name, timed
from benchmarks.table import write_table
from lyrics import config as schema
from lyrics import io, seeding
from lyrics.errors import InputError
from lyrics.foundation.tokenizer import load_text_tokenizer
from lyrics.model.inputs import TextTokenizer
from lyrics.refiner import features, shard_files
from lyrics.refiner.features import RefinedImage, RefinedSplit, Tokens
from lyrics.refiner.precision import FeatureDtype, token_bytes
from lyrics.train.loop import need
from lyrics.train.stage1 import FOUNDATION, REFINED
from lyrics.train.stage1_quality import HELD_OUT

DTYPES: tuple[FeatureDtype, ...] = get_args(FeatureDtype)
STORED: FeatureDtype = "fp16"
READ_SPLIT = "instruct"
SCORED_SPLITS = ("val", "test")


@dataclasses.dataclass(frozen=True)
class Access:
    """Reading one split: bytes on disk, bytes of a picture that is read; seconds a picture or shard in each round."""

    disk_bytes: int
    picture_bytes: float
    one_by_one: list[float]
    in_batches: list[float]
    opening: list[float]


def check(settings: schema.Config) -> None:
    """
    Raises:
        InputError: data/refined is not there, or does not hold what the others can be made of.
    """
    summary = io.read_json(need(REFINED / "summary.json", "refine"))
    if (summary["features"], summary["feature_dtype"]) != ("cached", STORED):
        raise InputError(
            f"{REFINED} holds {summary['features']} features in {summary['feature_dtype']}, expected cached ones in "
            f"{STORED}, which the others are made of; run: make run overrides='refine.features=cached "
            f"refine.feature_dtype={STORED}'"
        )
    if not (REFINED / READ_SPLIT).is_dir():
        raise InputError(f"{REFINED} has no split {READ_SPLIT}, which stage 2 trains on; give the source one")


def copy_project(folder: Path, dtype: FeatureDtype, max_objects: int) -> None:
    """A folder in which both stages of training run, its data/refined kept as `dtype`."""
    for path in (Path("data/raw"), FOUNDATION, REFINED / "summary.json"):
        link = folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    for table in sorted(REFINED.glob(f"*/{features.IMAGES_FILE}")):
        convert(RefinedSplit(table.parent), folder / table.parent, dtype, max_objects)


def convert(split: RefinedSplit, folder: Path, dtype: FeatureDtype, max_objects: int) -> None:
    """Write a split again, its features kept as `dtype`."""
    shards: dict[int, list[RefinedImage]] = collections.defaultdict(list)
    for image in split.images.values():
        shards[image.shard].append(image)
    for number, images in shards.items():
        images.sort(key=lambda image: image.row)
        target = features.shard_folder(folder, number)
        features.write_shard(target, _stored(split, images), max_objects=max_objects, feature_dtype=dtype)
        if dtype == STORED:
            _check_same(features.shard_folder(split.folder, number), target)
    for name in (features.IMAGES_FILE, features.SAMPLES_FILE):
        io.link_or_copy(split.folder / name, folder / name)


def _stored(split: RefinedSplit, images: Sequence[RefinedImage]) -> Iterator[tuple[RefinedImage, Tokens]]:
    for image in images:
        seen = split.seen(image.image_id)
        arrays = {field.name: getattr(seen, field.name).astype(np.float32) for field in dataclasses.fields(Tokens)}
        yield image, Tokens(**arrays)


def _check_same(stored: Path, written: Path) -> None:
    """What was converted is what was read: kept as it was, it is the same bytes."""
    one, other = (shard_files.read_manifest(folder) for folder in (stored, written))
    if one != other:
        raise AssertionError(f"{written} in {STORED} differs from {stored}: {other.sha256}, expected {one.sha256}")


def measure_access(
    splits: Mapping[FeatureDtype, RefinedSplit], tokenizer: TextTokenizer, batch_size: int, pictures: int, rounds: int
) -> dict[FeatureDtype, Access]:
    """Each round opens all shards, then reads pictures in an order of its own, one by one and as batches of tensors."""
    ids = next(iter(splits.values())).image_ids

    def read_one_by_one(split: RefinedSplit, order: Sequence[str]) -> None:
        for image_id in order:
            split.seen(image_id)

    def read_in_batches(split: RefinedSplit, order: Sequence[str]) -> None:
        for start in range(0, len(order), batch_size):
            tokenizer.visual_batch(split.see(order[start : start + batch_size]))

    def open_shards(split: RefinedSplit) -> None:
        for folder in shard_folders(split):
            shard_files.open_shard(folder, 1)

    found = {d: Access(disk_bytes(split.folder), picture_bytes(split, d), [], [], []) for d, split in splits.items()}
    for number in range(rounds + 1):  # the first brings the files into memory
        order = [ids[i] for i in seeding.rng("features", number).permutation(len(ids))[:pictures]]
        for dtype, split in splits.items():
            opening = timed(functools.partial(open_shards, split)) / len(shard_folders(split))
            one_by_one = timed(functools.partial(read_one_by_one, split, order)) / len(order)
            in_batches = timed(functools.partial(read_in_batches, split, order)) / len(order)
            if number:
                found[dtype].opening.append(opening)
                found[dtype].one_by_one.append(one_by_one)
                found[dtype].in_batches.append(in_batches)
    return found


def shard_folders(split: RefinedSplit) -> list[Path]:
    return [features.shard_folder(split.folder, number) for number in {i.shard for i in split.images.values()}]


def disk_bytes(folder: Path) -> int:
    """Of the features of a split, without its tables."""
    return sum(path.stat().st_size for path in folder.glob("shard-*/*.npy"))


def picture_bytes(split: RefinedSplit, dtype: FeatureDtype) -> float:
    """What a picture's tokens take in the mean; rows of a shard past a picture's objects are not read."""
    shapes = shard_files.read_manifest(features.shard_folder(split.folder, 0)).shapes
    _, patches, width = shapes[features.IMAGE_TOKENS]
    local = sum(token_bytes(shapes[name][-1], dtype) for name in features.LOCAL_TOKENS)
    objects = statistics.mean(len(image.tags) for image in split.images.values())
    return patches * token_bytes(width, dtype) + objects * local


def access_table(measured: Mapping[FeatureDtype, Access]) -> str:
    """One row per kept number; `ratio` compares rounds with those of fp16."""
    rows = [
        "| kept as | on disk, MiB | one by one, pictures/s | MB/s | ratio | in batches, pictures/s | MB/s | ratio "
        "| to open a shard, ms |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for dtype, one in measured.items():
        cells = [dtype, f"{one.disk_bytes / 2**20:.1f}"]
        for name in ("one_by_one", "in_batches"):
            seconds, stored = getattr(one, name), getattr(measured[STORED], name)
            ratio = statistics.median(s / own for s, own in zip(stored, seconds, strict=True))
            rate = 1 / statistics.median(seconds)
            cells += [f"{rate:.0f}", f"{rate * one.picture_bytes / 1e6:.0f}"]
            cells += ["" if dtype == STORED else f"{ratio:.2f} ×"]
        cells.append(f"{1e3 * statistics.median(one.opening):.2f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def steps_table(measured: Mapping[tuple[str, FeatureDtype], Steps]) -> str:
    """One row per stage and kept number: means over steps, in milliseconds."""
    parts = list(features_steps.PARTS)
    rows = [
        f"| stage | kept as | step, ms | on data, ms | share | {' | '.join(f'{part}, ms' for part in parts)} |",
        f"| --- | --- | --: | --: | --: |{' --: |' * len(parts)}",
    ]
    for (stage, dtype), steps in measured.items():
        each = " | ".join(f"{1e3 * steps.parts[part]:.1f}" for part in parts)
        data = sum(steps.parts.values())
        rows.append(
            f"| {stage} | {dtype} | {1e3 * steps.step:.0f} | {1e3 * data:.1f} | {data / steps.step:.1%} | {each} |"
        )
    return "\n".join(rows)


def errors_table(measured: Mapping[FeatureDtype, Errors]) -> str:
    """One row per kept number: what rounding loses of each array."""
    names = list(measured[STORED])
    rows = [
        f"| kept as | {' | '.join('error of ' + name.replace('_', ' ') for name in names)} |",
        f"| --- |{' --: |' * len(names)}",
    ]
    for dtype, found in measured.items():
        cells = ["–" if (error := found[name]) is None else f"{error:.2%}" for name in names]
        rows.append(f"| {dtype} | {' | '.join(cells)} |")
    return "\n".join(rows)


def scores_table(measured: Mapping[tuple[str, FeatureDtype], Scored]) -> str:
    """One row per split and kept number; answers beside those on fp16."""
    metrics = list(next(iter(measured.values())).metrics)
    rows = [
        f"| split | kept as | {' | '.join(metrics)} | other answers | better | worse |",
        f"| --- | --- |{' --: |' * (len(metrics) + 3)}",
    ]
    for (split, dtype), scored in measured.items():
        values = [scored.metrics.get(metric) for metric in metrics]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        beside = ["", "", ""]
        if dtype != STORED:
            changed = features_quality.compare(measured[split, STORED], scored)
            beside = [f"{changed.other} of {len(scored.answers)}", str(changed.better), str(changed.worse)]
        rows.append(f"| {split} | {dtype} | {' | '.join([*cells, *beside])} |")
    return "\n".join(rows)


def alignment_table(measured: Mapping[FeatureDtype, Mapping[str, float]]) -> str:
    """One row per kept number: what stage 1 learned, on held-out pictures."""
    names = list(measured[STORED])
    rows = [
        f"| stage 1 on | {' | '.join(name.replace('_', ' ') for name in names)} |",
        f"| --- |{' --: |' * len(names)}",
    ]
    rows += [f"| {d} | {' | '.join(f'{found[n]:.3f}' for n in names)} |" for d, found in measured.items()]
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2048, help="read in a round")
    parser.add_argument("--rounds", type=int, default=7, help="of reading")
    parser.add_argument("--steps", type=int, default=40, help="of each stage that count")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before them")
    parser.add_argument("--samples", type=int, help="scored of each task and split; without it, all")
    parser.add_argument("--write", type=Path, help="a document with the markers of features")
    chosen = parser.parse_args(arguments)
    settings = schema.load()
    check(settings)
    with tempfile.TemporaryDirectory(prefix="features-", dir="build") as folder:
        copies = {dtype: Path(folder).resolve() / dtype for dtype in DTYPES}
        for dtype, copy in copies.items():
            copy_project(copy, dtype, settings.refine.max_objects)
        text = measure(settings, copies, chosen)
    print(text)
    if chosen.write:
        write_table(chosen.write, "features", text)


def measure(settings: schema.Config, copies: Mapping[FeatureDtype, Path], chosen: argparse.Namespace) -> str:
    """All tables, and what they were measured with."""
    splits = {dtype: RefinedSplit(copy / REFINED / READ_SPLIT) for dtype, copy in copies.items()}
    tokenizer = TextTokenizer(load_text_tokenizer(FOUNDATION / "tokenizer"))
    pictures = min(chosen.pictures, len(splits[STORED]))
    batch = settings.stage1.batch_size
    read = measure_access(splits, tokenizer, batch, pictures, chosen.rounds)
    steps = features_steps.measure(settings, copies, chosen.steps, chosen.warm_up)
    held_out = [name for name in HELD_OUT if (REFINED / name).is_dir()]
    tables = [access_table(read), steps_table(steps), errors_table(features_quality.errors(settings, held_out[:1]))]
    if features_quality.STAGE2.is_dir():
        scored = [name for name in SCORED_SPLITS if (REFINED / name).is_dir()]
        tables.append(scores_table(features_quality.scores(settings, copies, scored, chosen.samples)))
        tables.append(alignment_table(features_quality.alignment(settings, copies)))
    threads = torch.get_num_threads()
    machine = (
        f"{cpu_name()}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}; preset {settings.preset}. "
        f"Reading: {pictures} pictures of {len(splits[STORED])}, batches of {batch}; medians of {chosen.rounds} "
        f"rounds. Steps: means of {chosen.steps} after {chosen.warm_up}."
    )
    return "\n\n".join([*tables, machine])


if __name__ == "__main__":
    main()
