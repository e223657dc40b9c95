"""`python -m tests.plan_accuracy [PROJECT]`: what the plan predicts beside short real runs of the training stages.

PROJECT (here, unless said) holds what `make run until=refine` makes; its preset is planned. Nothing is written there.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from lyrics import config as schema
from lyrics.plan import measure, memory, report
from lyrics.plan.hardware import GIB

ROOT = Path(__file__).parents[1]
READ = ("params", "data/refined", "models/foundation", "build/config.yaml")
ROUNDS, STEPS = 3, 20


@dataclasses.dataclass(frozen=True)
class Row:
    verb: str
    what: str
    predicted: float
    real: float

    @property
    def off(self) -> float:
        return self.predicted / self.real - 1


def lend(project: Path, folder: Path) -> Path:
    """A folder that shows what the stages read of a project; they write into it."""
    for name in READ:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to((project / name).resolve())
    return folder


def rows(project: Path, rounds: int = ROUNDS, steps: int = STEPS) -> list[Row]:
    """Real steps and those of `--measure` take turns, since what else the machine does changes by the minute."""
    config = schema.load(project / "build/config.yaml")
    plan = report.plan([f"preset={config.preset}", *report.precision_here()], run=ROOT / "params/run.yaml")
    here = dataclasses.replace(plan, hardware=measure.this_machine(plan.hardware))
    found = []
    for verb, stage in memory.STAGES.items():
        real, planned = [], []
        for _ in range(rounds):
            real.append(_real(project, verb, steps))
            rehearsed = measure.rehearse(stage, plan.config, plan.assumed, plan.stages[verb], here.hardware)
            assert rehearsed is not None, f"the steps of {stage} were not measured"
            planned.append(rehearsed)
        seconds = statistics.median(one["seconds_per_step"] for one in real)
        peak = max(one["peak_bytes"] for one in real) / GIB
        computed = report.chosen(plan, verb).total / GIB
        found += [
            Row(verb, "seconds a step, measured", statistics.median(one.seconds_per_step for one in planned), seconds),
            Row(verb, "seconds a step, computed", here.stages[verb].seconds(here.hardware), seconds),
            Row(verb, "peak GiB, measured", max(computed, max(one.peak_bytes for one in planned) / GIB), peak),
            Row(verb, "peak GiB, computed", computed, peak),
        ]
    return found


def table(preset: str, found: list[Row]) -> str:
    lines = ["| preset | stage | what | predicted | real | off |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{preset}` | `{r.verb}` | {r.what} | {r.predicted:.3g} | {r.real:.3g} | {r.off:+.0%} |" for r in found
    ]
    return "\n".join(lines)


def _real(project: Path, verb: str, steps: int) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("plan_probe.py")), verb, str(steps)]
    ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    with tempfile.TemporaryDirectory() as scratch:
        numbers = [int(one) for one in sys.argv[2:]]  # rounds, steps
        print(table(schema.load(source / "build/config.yaml").preset, rows(lend(source, Path(scratch)), *numbers)))
