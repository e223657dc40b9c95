import gzip
import json

import pytest

from lyrics.evaluate.vqa import CONTRACTIONS, normalise, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The red one.", "red 1"),
        ("dont", "don't"),
        ("Couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("1,000 people", "1000 people"),
        ("yes, please", "yes please"),
        ("black/white", "black white"),
        ("3.5", "3.5"),
        ("none", "0"),
        ("an apple", "apple"),
    ],
)
def test_normalises_as_the_challenge_does(answer, expected):
    assert normalise(answer) == expected


def test_contractions_cover_every_place_of_an_apostrophe():
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["twas"] == "'twas"


@pytest.mark.parametrize(("matching", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leaves_each_person_out_in_turn(matching, expected):
    references = ["blue"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert vqa_accuracy("Blue." if matching < 10 else "blue", references) == pytest.approx(expected)


def test_a_unanimous_reference_is_compared_letter_by_letter():
    assert vqa_accuracy("Two", ["two"] * 10) == 0.0
    assert vqa_accuracy(" two\n", ["two"] * 10) == 1.0
    assert vqa_accuracy("Two", ["two"] * 9 + ["3"]) == 1.0


# Means in per cent over the 2,962 questions, computed with vqaEval.py of github.com/GT-Vision-Lab/VQA at a013f00.
OFFICIAL = {"first": 87.7, "shouted": 51.91, "most": 96.74}


@pytest.mark.parametrize("style", sorted(OFFICIAL))
def test_agrees_with_the_official_script_on_real_questions(shared, style):
    annotations = json.loads(gzip.decompress((shared / "vqa_v2/vqa_annotatons_test.gzip").read_bytes()))["annotations"]
    say = {"first": str, "shouted": lambda a: f"The {a.upper()}!", "most": str}[style]
    total = 0.0
    for annotation in annotations:
        answers = [answer["answer"] for answer in annotation["answers"]]
        said = annotation["multiple_choice_answer"] if style == "most" else answers[0]
        total += vqa_accuracy(say(said), answers)
    assert 100 * total / len(annotations) == pytest.approx(OFFICIAL[style], abs=0.005)
