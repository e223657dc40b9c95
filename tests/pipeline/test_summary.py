from flows.summary import score_rows

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
