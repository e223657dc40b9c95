"""Predictions of `lyrics plan --measure` beside real runs of tiny's training stages."""

from pathlib import Path

import plan_accuracy
import pytest
import real_project

from lyrics.cli import PARTS

ALLOWED = {"seconds a step, measured": 0.35, "peak GiB, measured": 0.25, "peak GiB, computed": 0.25}


@pytest.mark.soak
def test_predictions_of_tiny_are_near_what_its_stages_take(tmp_path: Path) -> None:
    project = real_project.copy(tmp_path)
    for verb in ("compose", "ingest", *(f"foundation {part}" for part in PARTS), "clean", "refine"):
        project("lyrics", *verb.split())
    for row in plan_accuracy.rows(project.root):
        assert row.what not in ALLOWED or abs(row.off) <= ALLOWED[row.what], row
