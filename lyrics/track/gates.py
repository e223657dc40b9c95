"""What a version must pass to become champion: floors on its scores, and no significant loss against the champion."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lyrics import bootstrap
from lyrics.errors import InputError
from lyrics.seeding import rng


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """One condition and how it went. `detail` is a clause with the figures: what was found, by how much it failed."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'FAILED'}  {self.name}: {self.detail}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleScore:
    """Score of one sample; samples of one image are not independent, so images are what is resampled."""

    sample_id: str
    image_id: str
    task: str
    score: float


def read_scores(path: Path) -> list[SampleScore]:
    """The per-sample scores of one split, as `evaluate` writes them."""
    import pyarrow.parquet

    columns = ["sample_id", "image_id", "task", "score"]
    try:
        rows = pyarrow.parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path} holds no per-sample scores ({error}); make it with: dvc repro evaluate") from None
    return [SampleScore(**row) for row in rows if row["score"] is not None]


def floors(evaluation: Mapping[str, Any], split: str, minimum: Mapping[str, float]) -> list[Gate]:
    """One gate per metric in `minimum`; a metric that was not measured fails, with the reason."""
    metrics = evaluation.get("splits", {}).get(split, {})
    gates = []
    for metric, floor in sorted(minimum.items()):
        value = metrics.get(metric, {}).get("model")
        name = f"{split}/{metric} >= {floor:g}"
        if value is None:
            absent = evaluation.get("absent", {})
            reasons = [absent[key] for key in (f"{split}/{metric}", split, metric) if key in absent]
            reason = (reasons or [f"not in reports/evaluation.json for split {split}"])[0]
            gates.append(Gate(name=name, passed=False, detail=f"not measured ({reason})"))
        elif value < floor:
            gates.append(Gate(name=name, passed=False, detail=f"{value:.4f}, short by {floor - value:.4f}"))
        else:
            gates.append(Gate(name=name, passed=True, detail=f"{value:.4f}"))
    return gates


def no_worse(
    candidate: Iterable[SampleScore], champion: Iterable[SampleScore], *, bootstrap_samples: int, confidence: float
) -> list[Gate]:
    """One gate per task: it fails where the paired-bootstrap interval of (candidate - champion) lies below zero.

    Raises:
        InputError: the two were not scored on the same samples, or on none.
    """
    ours, theirs = {s.sample_id: s for s in candidate}, {s.sample_id: s for s in champion}
    if ours.keys() != theirs.keys():
        raise InputError(
            f"The candidate was scored on {len(ours)} samples and the champion on {len(theirs)}, of which "
            f"{len(ours.keys() & theirs.keys())} are the same; a paired comparison needs the same samples"
        )
    if not ours:
        raise InputError("The candidate was scored on no sample, so it cannot be compared with the champion")
    gates = []
    for task in sorted({sample.task for sample in ours.values()}):
        pairs = [(s.image_id, s.score - theirs[s.sample_id].score) for s in ours.values() if s.task == task]
        mean, low, high = paired_interval(pairs, bootstrap_samples=bootstrap_samples, confidence=confidence)
        detail = f"{mean:+.4f} ({100 * confidence:g} % interval {low:+.4f} to {high:+.4f}, n = {len(pairs)})"
        if high < 0:
            detail += f"; worse than the champion by at least {-high:.4f}"
        gates.append(Gate(name=f"{task} no worse than the champion", passed=high >= 0, detail=detail))
    return gates


def paired_interval(
    differences: Sequence[tuple[str, float]], *, bootstrap_samples: int, confidence: float
) -> tuple[float, float, float]:
    """Mean difference per sample with its percentile bootstrap interval, images resampled with replacement.

    Args:
        differences: (image id, difference of the two scores) per sample.
        confidence: e.g. 0.95 for the interval between the percentiles 2.5 and 97.5.
    """
    images, values = zip(*differences, strict=True)
    draws = rng("promote", len(values))  # a verdict can be repeated
    low, high = bootstrap.interval(values, images, draws, resamples=bootstrap_samples, confidence=confidence)
    return float(np.mean(values)), low, high
