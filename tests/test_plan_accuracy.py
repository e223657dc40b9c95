"""Predictions of `lyrics plan --measure` beside real runs of tiny's training stages."""

from pathlib import Path

import plan_accuracy
import pytest
import real_project

from lyrics.cli import PARTS


@pytest.mark.soak
def test_predictions_of_tiny_are_near_what_its_stages_take(tmp_path: Path) -> None:
    project = real_project.copy(tmp_path)
    for verb in ("compose", "ingest", *(f"foundation {part}" for part in PARTS), "clean", "refine"):
        project("lyrics", *verb.split())
    within = {"by measured steps": {"seconds": 0.35, "peak": 0.25}, "computed": {"peak": 0.25}}
    for row in plan_accuracy.rows(project.root):
        allowed = within.get(row.what.rpartition(", ")[2], {}).get(row.what.split()[0])
        assert allowed is None or abs(row.off) <= allowed, row
