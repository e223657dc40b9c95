"""`python plan_probe.py VERB STEPS` in a project's folder: a training stage for some steps; their time, peak memory.

Prints one line of JSON. The mix of kinds of steps is that of the whole stage.
"""

import dataclasses
import importlib
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

STAGES = {"pretrain": "stage1", "finetune": "stage2"}
WARM_UP = 1


class Clock:
    """A tracker that only notes when a step was logged."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        if any(name.endswith("samples_per_second") for name in metrics):
            self.at.append(time.perf_counter())

    def log_params(self, params: dict) -> None: ...

    def log_artifact(self, path: Path) -> None: ...


def mean_of_medians(at: list[float], kind_of: Callable[[int], int]) -> float:
    """Seconds a step: the median of each kind of step, as often as it comes. The first steps of each are warm-up."""
    found: dict[int, list[float]] = {}
    for step in range(1, len(at)):
        found.setdefault(kind_of(step), []).append(at[step] - at[step - 1])
    return sum(len(took) * statistics.median(took[WARM_UP:]) for took in found.values()) / (len(at) - 1)


def main(verb: str, steps: int) -> None:
    from lyrics import config as schema
    from lyrics.process import keep_freed_memory

    keep_freed_memory()  # as a stage does
    stage = STAGES[verb]
    config = schema.load()
    settings = getattr(config, stage)
    changes = {"steps": steps, "log_every": 1, "checkpoint_every": steps + 1}
    captions = 0
    if stage == "stage2":
        first = round(settings.first.steps / settings.steps * steps)
        changes["first"] = dataclasses.replace(settings.first, steps=first)
        captions = first if "caption" in settings.first.kinds else 0
    config = dataclasses.replace(config, **{stage: dataclasses.replace(settings, **changes)})
    work, clock = Path("build/probe") / stage, Clock()
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    importlib.import_module(f"lyrics.train.{stage}").run(config, work, clock)
    if stage == "stage1":
        shutil.rmtree("models/stage1", ignore_errors=True)
        shutil.copytree(work / "out", "models/stage1")
    seconds = mean_of_medians(clock.at, lambda step: step < captions if stage == "stage2" else step % 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds_per_step": seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
