"""What a training step spends on data: both stages run as their verbs do, with a clock around what handles data."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from lyrics import config as schema
from lyrics.model import lyrics as lyrics_model
from lyrics.model.inputs import TextTokenizer
from lyrics.model.lyrics import LyricsModel
from lyrics.refiner.features import RefinedSplit
from lyrics.refiner.precision import FeatureDtype
from lyrics.stage import NullTracker
from lyrics.train import stage1, stage1_batches, stage2
from lyrics.train.stage1_batches import Stage1Data
from lyrics.train.stage2_batches import Stage2Data

STAGES: Mapping[str, Any] = {"stage1": stage1, "stage2": stage2}
READING, TEXTS, TENSORS = "reading", "texts", "tensors"
# What handles data in a step, wherever it is called: in stage 2 the model itself tokenises and pads.
PARTS: Mapping[str, Sequence[tuple[Any, str]]] = {
    READING: ((RefinedSplit, "see"), (stage1_batches, "see")),
    TEXTS: (
        (Stage1Data, "batch"),
        (Stage2Data, "batch"),
        (TextTokenizer, "ids"),
        (LyricsModel, "conversation"),
        (LyricsModel, "normaliser"),
    ),
    TENSORS: ((TextTokenizer, "visual_batch"), (TextTokenizer, "pad_rows"), (lyrics_model, "assemble")),
}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Means over steps, in seconds: of a whole step, and of each part of it that handles data."""

    step: float
    parts: dict[str, float]


class Clock(NullTracker):
    """Adds up the time inside watched functions, each moment to the innermost, and notes it when a step is logged."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.marks: list[tuple[float, dict[str, float]]] = []
        self._running: list[str] = []
        self._since = 0.0

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        if step is not None:
            self.marks.append((time.perf_counter(), self.seconds.copy()))

    def watch(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **options: Any) -> Any:
            if self._running[-1:] == [part]:
                return function(*arguments, **options)
            self._credit()
            self._running.append(part)
            try:
                return function(*arguments, **options)
            finally:
                self._credit()
                self._running.pop()

        return watched

    def _credit(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def watching(self, parts: Mapping[str, Sequence[tuple[Any, str]]] = PARTS) -> Iterator[None]:
        """Put the clock around every function that `parts` names by its owner and name."""
        with contextlib.ExitStack() as stack:
            for part, functions in parts.items():
                for owner, name in functions:
                    stack.enter_context(mock.patch.object(owner, name, self.watch(part, getattr(owner, name))))
            yield

    def steps(self, warm_up: int) -> Steps:
        """Means over what was logged after the first `warm_up` steps."""
        marks = self.marks[warm_up - 1 :]
        (start, before), (end, after), count = marks[0], marks[-1], len(marks) - 1
        return Steps((end - start) / count, {part: (after[part] - before[part]) / count for part in PARTS})


def measure(
    settings: schema.Config, copies: Mapping[FeatureDtype, Path], steps: int, warm_up: int
) -> dict[tuple[str, FeatureDtype], Steps]:
    """Steps of both stages in each copy of the project; stage 2 goes on from what stage 1 wrote there."""
    found: dict[tuple[str, FeatureDtype], Steps] = {}
    for name in STAGES:
        for dtype, copy in copies.items():
            with contextlib.chdir(copy):
                found[name, dtype] = run(name, settings, Path("work") / name, steps, warm_up)
                (Path("work") / name / "out").rename(Path("models") / name)
    return found


def run(name: str, settings: schema.Config, work: Path, steps: int, warm_up: int) -> Steps:
    """Some steps of a stage in the current folder.

    Stage 2 is measured as it is after `stage2.first`, when it draws samples of all kinds.
    """
    total = warm_up + steps
    chosen: dict[str, Any] = {"steps": total, "log_every": 1, "checkpoint_every": total}
    if name == "stage2":
        chosen["first"] = dataclasses.replace(settings.stage2.first, steps=0)
    own = dataclasses.replace(getattr(settings, name), **chosen)
    clock = Clock()
    with clock.watching():
        STAGES[name].run(dataclasses.replace(settings, **{name: own}), work, clock)
    return clock.steps(warm_up)
