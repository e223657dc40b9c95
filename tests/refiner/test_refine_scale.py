"""Ten times as many pictures through `refine`: no more memory, ten times the time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import real_project
import scale

COUNTS = (2_000, 20_000)


def figures(folder: Path, models: Path, count: int) -> dict[str, float]:
    (folder / "models").mkdir(parents=True)
    shutil.copytree(models, folder / "models/foundation")
    environment = {**os.environ, "PYTHONPATH": str(scale.ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, scale.__file__]
    subprocess.run([*command, "write", str(count)], cwd=folder, env=environment, check=True)
    ran = subprocess.run([*command, "run"], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout)


@pytest.mark.soak  # the parts are fitted (two minutes), and 22,000 pictures refined
@pytest.mark.timeout(7200)
def test_memory_stays_and_time_grows_linearly(tmp_path: Path) -> None:
    project = real_project.copy(tmp_path / "project")
    project("lyrics", "configure", "~overrides", "preset=tiny", "data=world")
    project("lyrics", "compose")
    project("lyrics", "ingest")
    for part in ("tokenizer", "clip", "tagger", "detector", "segmenter"):
        project("lyrics", "foundation", part)
    few, many = (figures(tmp_path / str(count), tmp_path / "project/models/foundation", count) for count in COUNTS)
    print(few, many, sep="\n")
    for found, count in zip((few, many), COUNTS, strict=True):
        assert found["images"] == found["samples"] == count and found["objects"] > count
    assert many["peak_mib"] <= 1.1 * few["peak_mib"]
    assert many["cpu_seconds"] <= 1.15 * 10 * few["cpu_seconds"]
