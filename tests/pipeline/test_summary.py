"""What a run ends with."""

from io import StringIO

import pytest
from rich.console import Console

from flows import summary
from flows.stages import Outcome
from flows.summary import score_rows
from lyrics import io

VALUE = {"model": 0.5, "most_frequent": 0.25, "other_image": None, "other_features": 0.0, "n": 8}
EVALUATION = {
    "splits": {
        "test": {"vqa_accuracy": VALUE, "vqa_accuracy/colour": VALUE, "cider": VALUE, "bleu_1": VALUE},
        "val": {"pope_accuracy": VALUE, "pope_f1": VALUE},
    }
}


def test_headlines_are_one_row_per_split_and_task():
    rows = score_rows(EVALUATION, headlines=True)
    assert [(row["split"], row["metric"]) for row in rows] == [
        ("test", "vqa_accuracy"),
        ("test", "cider"),
        ("val", "pope_accuracy"),
    ]
    assert [rows[0][name] for name in ("Lyrics", "most frequent", "other image", "other features", "n")] == [
        "0.500", "0.250", "-", "0.000", "8",
    ]  # fmt: skip


def test_all_rows_hold_slices_too():
    assert {row["metric"] for row in score_rows(EVALUATION)} >= {"vqa_accuracy/colour", "pope_f1"}
    assert len(score_rows(EVALUATION)) == 6


def test_a_run_that_stopped_before_evaluate_shows_no_scores_of_another(tmp_path, monkeypatch):
    """Nor its example: the pictures of the other run may be gone."""
    monkeypatch.chdir(tmp_path)
    io.write_json(summary.EVALUATION, EVALUATION)
    monkeypatch.setattr(summary, "example", lambda: pytest.fail("an example of another run was looked for"))
    console = Console(width=110, record=True, file=StringIO())
    summary.report([Outcome(stage="refine", how="ran", seconds=1.0)], "not registered", console)
    said = console.export_text()
    assert "refine" in said and "vqa_accuracy" not in said and "index.html" not in said
