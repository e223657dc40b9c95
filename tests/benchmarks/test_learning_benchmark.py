"""The ablations change what their names say, and the table has each metric's mean and extremes."""

from pathlib import Path
from typing import Any

from benchmarks.learning import changed, evaluation, table
from lyrics import io

CONFIG: dict[str, Any] = {
    "seed": 0,
    "evaluate": {"splits": ["val", "test"]},
    "mq_former": {"visual_queries": 8, "grounding_queries": 4},
    "stage1": {"steps": 150},
}


def test_without_grounding_queries_the_language_model_reads_as_many_tokens() -> None:
    found = changed(CONFIG, "no grounding queries", 1)
    assert found["mq_former"] == {"visual_queries": 12, "grounding_queries": 0}
    assert found["seed"] == 1 and found["stage1"] == {"steps": 150}
    assert CONFIG["mq_former"] == {"visual_queries": 8, "grounding_queries": 4}


def test_without_pre_training_stage_1_makes_no_step() -> None:
    assert changed(CONFIG, "no pre-training", 0)["stage1"] == {"steps": 0}


def test_what_the_project_itself_has_trained_is_not_trained_again(tmp_path: Path) -> None:
    io.write_json(tmp_path / "reports/evaluation.json", {"splits": {"test": {"vqa_accuracy": {"model": 0.75}}}})
    found = evaluation(tmp_path, tmp_path / "work", CONFIG, "full", seed=0)
    assert found == {"vqa_accuracy": {"model": 0.75}} and not (tmp_path / "work").exists()


def scores(model: float, colour: float) -> dict[str, dict[str, float | None]]:
    return {
        "vqa_accuracy": {"model": model, "most_frequent": 0.25, "other_features": None, "n": 9},
        "vqa_accuracy/colour": {"model": colour, "most_frequent": 0.1, "other_features": 0.2, "n": 3},
        "cider": {"model": 2.0, "most_frequent": 0.1, "other_features": 0.2, "n": 3},
    }


def test_the_table_has_mean_and_extremes_of_each_variant_and_kind() -> None:
    rows = table({"full": [scores(0.5, 0.6), scores(0.7, 0.8)], "other": [scores(0.1, 0.2)]}).splitlines()[2:]
    assert rows == [
        "| vqa_accuracy | 9 | 0.250 | – | 0.600 (0.500–0.700) | 0.100 (0.100–0.100) |",
        "| vqa_accuracy/colour | 3 | 0.100 | 0.200 | 0.700 (0.600–0.800) | 0.200 (0.200–0.200) |",
    ]
