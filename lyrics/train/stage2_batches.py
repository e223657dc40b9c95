"""Batches of stage 2: instructions of several tasks or sources, mixed.

Every draw is keyed by (seed, step, slot): any sample of any step can be had alone, so that training resumes anywhere.
"""

import bisect
import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lyrics.data.prompts import instruction, target
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage
from lyrics.model.lyrics import Texts
from lyrics.refiner.features import RefinedSplit
from lyrics.refiner.spatial_text import CoordinateFormat
from lyrics.seeding import rng

log = logging.getLogger(__name__)

JOINED = ("vqa", "refer", "pope")  # tasks whose questions about one picture may follow each other in a sample


Shares = Literal["sqrt", "as_given"] | dict[str, float]
MixBy = Literal["task", "source"]


def mixing_weights(sizes: dict[str, int], shares: Shares) -> dict[str, float]:
    """How often each group is drawn, in [0, 1].

    Args:
        sizes: number of samples of each task, or of each source.
        shares: `sqrt` by the square root of a group's size, `as_given` by its size (every sample is as likely), or a
            share by name, scaled to the groups at hand.

    Raises:
        InputError: no group at hand has a share.
    """
    if isinstance(shares, dict):
        weights = {name: shares.get(name, 0.0) for name in sizes}
    else:
        weights = {name: float(np.sqrt(size)) if shares == "sqrt" else float(size) for name, size in sizes.items()}
    total = sum(weights.values())
    if total <= 0:
        raise InputError(
            f"stage2.shares names {', '.join(shares)}, but the data has only {', '.join(sizes)}; "
            "give one of these a share, or set it to sqrt or as_given"
        )
    return {name: float(weight / total) for name, weight in weights.items() if weight > 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage2Batch:
    """Samples, each with its id; instruction and answer of a dialogue are tuples, one text for each turn."""

    ids: tuple[str, ...]
    image_ids: list[str]
    instructions: list[Texts]
    answers: list[Texts]
    spatial_texts: list[str]
    split: RefinedSplit = dataclasses.field(compare=False, repr=False)

    @functools.cached_property
    def seen(self) -> list[SeenImage]:
        """Read, or looked at, when it is first asked for: of a part without the rest."""
        return self.split.see(self.image_ids)

    def part(self, rows: slice) -> "Stage2Batch":
        names = [field.name for field in dataclasses.fields(self) if field.name != "split"]
        return Stage2Batch(split=self.split, **{name: getattr(self, name)[rows] for name in names})

    def not_finite(self) -> list[str]:
        return not_finite(self.ids, self.seen)


def not_finite(ids: Sequence[str], seen: Sequence[SeenImage]) -> list[str]:
    """Ids of the samples whose features are not."""
    return sorted({i for i, picture in zip(ids, seen, strict=True) if not picture.is_finite()})


@dataclasses.dataclass(frozen=True)
class First:
    """What the first steps draw from: samples of some kinds, with a share of them of its own without spatial text."""

    steps: int
    kinds: tuple[str, ...]
    without_spatial: float


NO_FIRST = First(0, (), 0.0)


class Pool:
    """Samples that are drawn by the shares of their tasks or sources.

    Raises:
        InputError: no group at hand has a share.
    """

    def __init__(self, samples: Sequence[Sample], shares: Shares, mix_by: MixBy = "task") -> None:
        self.groups: dict[str, list[Sample]] = {}
        self.asked: dict[str, dict[str, list[Sample]]] = {}  # questions about a picture, by group
        for sample in samples:
            group = sample.task if mix_by == "task" else sample.source or sample.task
            self.groups.setdefault(group, []).append(sample)
            if sample.task in JOINED:
                self.asked.setdefault(sample.image_id, {}).setdefault(group, []).append(sample)
        self.weights = mixing_weights({name: len(found) for name, found in self.groups.items()}, shares)

    def draw(self, turns: int, draw: np.random.Generator) -> list[Sample]:
        """A sample; if it is a question, up to `turns` about its picture, none asked twice."""
        group = self.groups[_choose(self.weights, draw)]
        sample = group[draw.integers(len(group))]
        chosen = {instruction(sample): sample}
        asked = self.asked[sample.image_id] if sample.task in JOINED else {}
        left = {name: [found[i] for i in draw.permutation(len(found))] for name, found in asked.items()}
        while len(chosen) < turns and (weights := {t: w for t, w in self.weights.items() if left.get(t)}):
            other = left[_choose(weights, draw)].pop()
            chosen.setdefault(instruction(other), other)
        return list(chosen.values())


class Stage2Data:
    """Samples of a refined split by task."""

    def __init__(
        self,
        split: RefinedSplit,
        *,
        coordinate_format: CoordinateFormat,
        shares: Shares,
        mix_by: MixBy = "task",
        without_spatial: float,
        spatial_text_in_llm: bool,
        first: First = NO_FIRST,
        turns: int = 1,
        seed: int,
    ) -> None:
        self.split, self.coordinate_format, self.seed = split, coordinate_format, seed
        self.without_spatial, self.spatial_text_in_llm = without_spatial, spatial_text_in_llm
        self.turns = turns
        self.later = Pool(split.samples, shares, mix_by)
        of_kinds = [s for s in split.samples if s.kind in first.kinds]
        if first.steps and not of_kinds:
            log.warning("no sample is of stage2.first.kinds (%s): all tasks from the start", ", ".join(first.kinds))
        self.first = first if of_kinds else NO_FIRST
        self.early = Pool(of_kinds, "sqrt", mix_by) if of_kinds else self.later

    def __len__(self) -> int:
        return len(self.split.samples)

    def batch(self, step: int, batch_size: int) -> Stage2Batch:
        chosen = [self._draw(step, slot) for slot in range(batch_size)]
        samples = [sample for sample, *_ in chosen]
        return Stage2Batch(
            ids=tuple(s.sample_id for s in samples),
            instructions=[i for _, i, _, _ in chosen],
            image_ids=[s.image_id for s in samples],
            answers=[a for *_, a, _ in chosen],
            spatial_texts=[
                self.split.images[s.image_id].spatial_text if with_spatial else "" for s, *_, with_spatial in chosen
            ],
            split=self.split,
        )

    def _draw(self, step: int, slot: int) -> tuple[Sample, Texts, Texts, bool]:
        """A sample, its questions, its answers, and whether the language model reads the picture's objects."""
        draw = rng(self.seed, "stage2", step, slot)
        early = step < self.first.steps
        samples = (self.early if early else self.later).draw(self.turns, draw)
        without = self.first.without_spatial if early else self.without_spatial
        boxes = any(s.task == "refer" for s in samples)
        with_spatial = self.spatial_text_in_llm and (boxes or draw.random() >= without)
        questions, answers = zip(*[turn for s in samples for turn in self._turns(s, draw)], strict=True)
        return samples[0], questions, answers, with_spatial

    def _turns(self, sample: Sample, draw: np.random.Generator) -> tuple[tuple[str, str], ...]:
        """Question and answer; several of a dialogue."""
        if sample.task == "chat":
            return sample.turns
        image, choice = self.split.images[sample.image_id], int(draw.integers(1 << 30))
        return ((instruction(sample), target(sample, image.width, image.height, self.coordinate_format, choice)),)


def _choose(weights: dict[str, float], draw: np.random.Generator) -> str:
    """A name by its weight; the weights need not add up to 1.

    The draw of `numpy.random.Generator.choice`, which takes twenty times as long for a few names.
    """
    cumulative = list(itertools.accumulate(weights.values()))
    place = bisect.bisect_right([share / cumulative[-1] for share in cumulative], draw.random())
    return list(weights)[place]


def without_target(samples: Sequence[Sample]) -> list[str]:
    """Ids of samples that have nothing to learn from: no answer, no box, no turn."""
    return [s.sample_id for s in samples if not (s.references or s.box_xyxy or s.turns)]
