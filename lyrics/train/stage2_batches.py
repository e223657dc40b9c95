"""Batches of stage 2: instructions of several tasks, mixed; every draw keyed by (seed, step, slot)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from lyrics.data.prompts import instruction, target
from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.model.inputs import SeenImage
from lyrics.model.lyrics import Texts
from lyrics.refiner.features import RefinedSplit
from lyrics.refiner.spatial_text import CoordinateFormat
from lyrics.seeding import rng


def mixing_weights(sizes: dict[str, int], shares: dict[str, float] | None) -> dict[str, float]:
    """How often each task is drawn: by `shares`, scaled to the tasks at hand, else by the square root of its size.

    Raises:
        InputError: no task at hand has a share.
    """
    weights = {task: np.sqrt(size) if shares is None else shares.get(task, 0.0) for task, size in sizes.items()}
    total = sum(weights.values())
    if total <= 0:
        raise InputError(
            f"stage2.task_shares names {', '.join(shares or {})}, but the data has only {', '.join(sizes)}; "
            "give one of these a share, or set it to null"
        )
    return {task: float(weight / total) for task, weight in weights.items() if weight > 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage2Batch:
    """Samples, each with its id; instruction and answer of a dialogue are tuples, one text for each turn."""

    ids: tuple[str, ...]
    instructions: list[Texts]
    seen: list[SeenImage]
    answers: list[Texts]
    spatial_texts: list[str]

    def part(self, rows: slice) -> "Stage2Batch":
        return Stage2Batch(**{field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)})

    def not_finite(self) -> list[str]:
        """Ids of the samples whose features are not."""
        return sorted({i for i, seen in zip(self.ids, self.seen, strict=True) if not seen.is_finite()})


class Stage2Data:
    """Samples of a refined split by task."""

    def __init__(
        self,
        split: RefinedSplit,
        *,
        coordinate_format: CoordinateFormat,
        task_shares: dict[str, float] | None,
        without_spatial: float,
        spatial_text_in_llm: bool,
        caption_steps: int = 0,
        seed: int,
    ) -> None:
        self.split, self.coordinate_format, self.seed = split, coordinate_format, seed
        self.without_spatial, self.spatial_text_in_llm = without_spatial, spatial_text_in_llm
        self.caption_steps = caption_steps
        self.by_task: dict[str, list[Sample]] = {}
        for sample in split.samples:
            self.by_task.setdefault(sample.task, []).append(sample)
        self.weights = mixing_weights({t: len(s) for t, s in self.by_task.items()}, task_shares)

    def __len__(self) -> int:
        return sum(map(len, self.by_task.values()))

    def batch(self, step: int, batch_size: int) -> Stage2Batch:
        chosen = [self._draw(step, slot) for slot in range(batch_size)]
        samples = [sample for sample, *_ in chosen]
        return Stage2Batch(
            ids=tuple(s.sample_id for s in samples),
            instructions=[i for _, i, _, _ in chosen],
            seen=[self.split.seen(s.image_id) for s in samples],
            answers=[a for *_, a, _ in chosen],
            spatial_texts=[
                self.split.images[s.image_id].spatial_text if with_spatial else "" for s, *_, with_spatial in chosen
            ],
        )

    def _draw(self, step: int, slot: int) -> tuple[Sample, Texts, Texts, bool]:
        draw = rng(self.seed, "stage2", step, slot)
        only_captions = step < self.caption_steps and "caption" in self.by_task
        task = list(self.weights)[draw.choice(len(self.weights), p=list(self.weights.values()))]
        if only_captions:
            task = "caption"
        sample = self.by_task[task][draw.integers(len(self.by_task[task]))]
        image = self.split.images[sample.image_id]
        choice = int(draw.integers(1 << 30))
        with_spatial = self.spatial_text_in_llm and (task == "refer" or draw.random() >= self.without_spatial)
        with_spatial = with_spatial and not only_captions
        if sample.task == "chat":
            questions, answers = zip(*sample.turns, strict=True)
            return sample, questions, answers, with_spatial
        answer = target(sample, image.width, image.height, self.coordinate_format, choice)
        return sample, instruction(sample), answer, with_spatial


def without_target(samples: Sequence[Sample]) -> list[str]:
    """Ids of samples that have nothing to learn from: no answer, no box, no turn."""
    return [s.sample_id for s in samples if not (s.references or s.box_xyxy or s.turns)]
