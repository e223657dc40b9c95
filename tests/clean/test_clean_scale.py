"""Ten times as many pairs through `clean`: no more memory, and ten times the work."""

import collections
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import clean_pairs
from benchmarks.watch import watched

ROOT = Path(__file__).parents[2]
COUNTS = (10_000, 100_000)


def figures(folder: Path, count: int) -> dict[str, Any]:
    """Two workers beside the driver; generation is not part of what is measured."""
    clean_pairs.write(folder, count)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", "benchmarks.clean_programs", "clean", "--workers", "2"]
    return watched(command, folder, environment)


@pytest.mark.soak  # 110,000 pairs are made and cleaned
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
    few, many = measured
    assert many["high_water_bytes"] <= 1.1 * few["high_water_bytes"]
    # Processor time of driver and workers, which a busy machine changes less than the time of the clock. A search that
    # compared each picture with all before it would take a third more than linear.
    assert many["cpu_seconds"] <= 1.15 * 10 * few["cpu_seconds"]
