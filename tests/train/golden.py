"""The loss curves of both stages over 20 steps on the CPU, as numbers in golden/: `python -m tests.train.golden`.

It prints how far the curves are from what is written; `--write` writes them anew, after a change that is meant to move
them. Adam in fp32 without dropout: the curves follow from weights, data and mathematics, not from the order of draws.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lyrics import io
from lyrics.stage import NullTracker
from lyrics.train import stage1, stage2

sys.path.insert(0, str(Path(__file__).parent))
import small_project

FOLDER = Path(__file__).parent / "golden"
STAGES: dict[str, Callable] = {"stage1": stage1.run, "stage2": stage2.run}
TOLERANCE = 1e-4  # a start that is off by 1e-6 of itself ends within 2e-5; one or two threads, within 1e-6
DIGITS = 6
Curves = dict[str, list[float]]


def train(stage: str, folder: Path) -> Curves:
    """Every loss of `stage` by step, from a run in a new project in `folder`."""
    config = small_project.configuration()
    with contextlib.chdir(folder):
        small_project.make(folder, config)
        STAGES[stage](config, folder / "work", NullTracker())
        rows = [json.loads(line) for line in Path("work/out/history.jsonl").read_text().splitlines()]
    return {key: [round(row[key], DIGITS) for row in rows] for key in sorted(rows[0]) if key != "step"}


def read(stage: str) -> Curves:
    return io.read_json(FOLDER / f"{stage}.json")


def distances(found: Curves, expected: Curves) -> dict[str, float]:
    """The largest difference of each curve; infinite for one that only one side has."""
    return {
        key: max(abs(a - b) for a, b in zip(found[key], expected[key], strict=True))
        if key in found and key in expected
        else float("inf")
        for key in sorted(found | expected)
    }


def main(arguments: list[str]) -> None:
    for stage in STAGES:
        with tempfile.TemporaryDirectory() as folder:
            found = train(stage, Path(folder))
        if "--write" in arguments:
            io.write_json(FOLDER / f"{stage}.json", found)
        for key, distance in distances(found, read(stage)).items():
            print(f"{key} {found[key][0]:.4f} → {found[key][-1]:.4f}, {distance:.1e} from golden")


if __name__ == "__main__":
    main(sys.argv[1:])
