"""`python -m tests.plan.accuracy [FOLDER]`: what the plan predicts of tiny beside short real runs of its stages.

FOLDER is a project with refined data; without one, a copy is made and run up to `refine`, which takes minutes.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import real_project

from lyrics.cli import PARTS
from lyrics.plan import report

ROOT = Path(__file__).parents[2]
STEPS = 20
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Row:
    verb: str
    what: str
    predicted: float
    real: float

    @property
    def off(self) -> float:
        return self.predicted / self.real - 1


def refined(folder: Path) -> Path:
    """A project with what `pretrain` and `finetune` of tiny read."""
    project = real_project.copy(folder)
    project("lyrics", "compose")
    project("lyrics", "ingest")
    for part in PARTS:
        project("lyrics", "foundation", part)
    for verb in ("clean", "refine"):
        project("lyrics", verb)
    return folder


def rows(project: Path) -> list[Row]:
    """Real steps before and after the measured plan, since what else the machine does changes by the minute."""
    before = {verb: _real(project, verb) for verb in ("pretrain", "finetune")}
    plan = report.plan(["preset=tiny"], measured=True, run=project / "params/run.yaml")
    after = {verb: _real(project, verb) for verb in ("pretrain", "finetune")}
    found = []
    for verb, first in before.items():
        seconds = (first["seconds_per_step"] + after[verb]["seconds_per_step"]) / 2
        peak = max(first["peak_bytes"], after[verb]["peak_bytes"]) / GIB
        computed = min(use.total for use in report.uses(plan, verb)) / GIB
        found += [
            Row(verb, "seconds a step, by measured steps", plan.seconds_per_step(verb)[0], seconds),
            Row(verb, "peak memory GiB, by measured steps", plan.peak_bytes(verb) / GIB, peak),
            Row(verb, "peak memory GiB, computed", computed, peak),
        ]
    return found


def table(found: list[Row]) -> str:
    lines = ["| stage | what | predicted | real | off |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| `{r.verb}` | {r.what} | {r.predicted:.3g} | {r.real:.3g} | {r.off:+.0%} |" for r in found]
    return "\n".join(lines)


def _real(project: Path, verb: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(project)}
    command = [sys.executable, str(Path(__file__).with_name("probe.py")), verb, str(STEPS)]
    ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(table(rows(Path(sys.argv[1]).resolve())))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            print(table(rows(refined(Path(scratch)))))
