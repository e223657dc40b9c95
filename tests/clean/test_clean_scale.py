"""A hundred times as many pairs through `clean`: no more memory, and each further pair costs what the first did."""

import collections
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import clean_pairs
from benchmarks.watch import watched

ROOT = Path(__file__).parents[2]
COUNTS = (1_000, 10_000, 100_000)


def figures(folder: Path, count: int) -> dict[str, Any]:
    """Two workers beside the driver; generation is not part of what is measured."""
    clean_pairs.write(folder, count)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "benchmarks.clean_programs", "clean", "--workers", "2"]
    return watched(command, folder, environment)


@pytest.mark.soak  # 111,000 pairs are made and cleaned
@pytest.mark.timeout(7200)
def test_memory_stays_and_time_grows_linearly(tmp_path: Path) -> None:
    measured = []
    for count in COUNTS:
        found = figures(tmp_path / str(count), count)
        links = found.pop("links")
        measured.append(found)
        print(found)
        planted = [clean_pairs.planted(number) for number in range(count)]
        reasons = collections.Counter(what.reason for what in planted if what.reason)
        assert found["pairs"] == found["keys"] == count
        assert found["dropped"] == reasons and found["kept"] == count - reasons.total()
        originals = {clean_pairs.key(what.number): what.original for what in planted if what.reason == "duplicate"}
        assert {copy: int(original) for copy, original in links} == originals
    fewest, few, many = measured
    assert many["high_water_bytes"] <= 1.1 * few["high_water_bytes"]
    # Processor time of driver and workers: a busy machine hardly changes it. Differences leave out what every run pays
    # once, starting workers and importing, which would make growth look slower than it is.
    assert many["cpu_seconds"] - few["cpu_seconds"] <= 1.15 * 10 * (few["cpu_seconds"] - fewest["cpu_seconds"])
