"""Predictions of `lyrics plan --measure` beside real runs of tiny's training stages."""

from pathlib import Path

import accuracy
import pytest


@pytest.mark.soak
def test_predictions_of_tiny_are_near_what_its_stages_take(tmp_path: Path) -> None:
    for row in accuracy.rows(accuracy.refined(tmp_path)):
        allowed = 0.25 if "memory" in row.what else 0.35
        assert abs(row.off) <= allowed, row
