import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lyrics import bootstrap
from lyrics.evaluate import metrics

corner = st.floats(0, 100, allow_nan=False)
box = st.tuples(corner, corner, corner, corner).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


def test_iou_of_known_boxes():
    assert metrics.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert metrics.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
    assert metrics.iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


@given(box, box)
def test_iou_is_symmetric_and_a_fraction(first, second):
    value = metrics.iou(first, second)
    assert 0 <= value <= 1 + 1e-9
    assert value == pytest.approx(metrics.iou(second, first))


def test_a_box_must_overlap_by_more_than_half():
    assert metrics.refer_hit((0, 0, 10, 10), (0, 0, 10, 5)) == 0.0  # exactly one half
    assert metrics.refer_hit((0, 0, 10, 10), (0, 0, 10, 5.1)) == 1.0
    assert metrics.refer_hit(None, (0, 0, 1, 1)) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("no, there is none", "no"),
        ("There is not a dog in it", "no"),
        ("Yes. There is no doubt", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_reads_yes_and_no_as_pope_does(answer, expected):
    assert metrics.yes_or_no(answer) == expected


def test_pope_counts():
    found = metrics.pope_scores(["yes"] * 6 + ["no"] * 4, ["yes"] * 4 + ["no"] * 5 + ["yes"])
    assert (found.accuracy, found.precision, found.recall, found.yes_ratio) == (0.7, 4 / 6, 4 / 5, 0.6)
    assert found.f1 == pytest.approx(8 / 11)


def test_pope_never_divides_by_zero():
    found = metrics.pope_scores(["no", "no"], ["no", "yes"])
    assert (found.accuracy, found.precision, found.recall, found.f1, found.yes_ratio) == (0.5, 0, 0, 0, 0)


def test_always_yes_on_the_official_questions(shared):
    """The published property of POPE's sets: half of the 3,000 questions are answered by yes."""
    lines = (shared / "pope/coco_pope_random.json").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    found = metrics.pope_scores(["yes"] * len(labels), labels)
    assert (len(labels), found.accuracy, found.recall) == (3000, 0.5, 1.0)
    assert found.f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("questions", [1, 4])
def test_an_interval_is_as_wide_as_there_are_pictures_not_questions(questions):
    """All questions about a picture are answered alike: several tell no more than one."""
    right = np.random.default_rng(0).random(200).round()
    pictures = [str(n) for n in range(200)] * questions
    low, high = bootstrap.interval(
        np.tile(right, questions), pictures, np.random.default_rng(1), resamples=1000, confidence=0.95
    )
    assert low < right.mean() < high
    assert high - low == pytest.approx(4 * right.std() / np.sqrt(200), rel=0.15)
