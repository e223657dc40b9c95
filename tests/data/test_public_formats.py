"""Readers on the real files of VQAv2, RefCOCO, POPE, LLaVA, and on damaged records."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyrics.data import llava, pope, refcoco, vqa
from lyrics.data.files import is_safe_name
from lyrics.data.records import BadRecordError
from lyrics.data.streams import json_lines
from lyrics.errors import InputError


def test_vqa_v2(shared):
    folder = shared("formats/vqa_v2")
    samples, rejected = vqa.read(folder / "vqa_questions_test.gzip", folder / "vqa_annotatons_test.gzip")
    assert rejected == []
    assert len(samples) == 2962
    assert {len(sample.references) for sample in samples} == {10}
    first = samples[0]
    assert (first.question, first.image_id, first.references[0]) == ("Is there a bell on the train?", "540769", "yes")
    assert first.kind == "is there a"


@pytest.mark.parametrize(("name", "count"), [("refcoco_unc_testA", 5657), ("refcocog_umd_val", 4896)])
def test_refcoco(shared, name, count):
    samples, rejected = refcoco.read(shared(f"formats/refcoco/REC_{name}.jsonl.gz"))
    assert rejected == []
    assert len(samples) == count
    assert all(sample.image_id.startswith("COCO_train2014_") for sample in samples)
    assert all(0 <= s.box_xyxy[0] < s.box_xyxy[2] and 0 <= s.box_xyxy[1] < s.box_xyxy[3] for s in samples)


def test_pope(shared):
    samples, rejected = pope.read(shared("formats/pope/coco_pope_random.json"))
    assert rejected == []
    assert Counter(sample.references[0] for sample in samples) == {"yes": 1500, "no": 1500}
    assert {sample.kind for sample in samples} == {"random"}
    assert samples[0].question == "Is there a snowboard in the image?"


def test_llava_evaluation(shared):
    folder = shared("formats/llava")
    samples, rejected = llava.read_evaluation(folder / "qa90_questions.jsonl", folder / "qa90_gpt4_answer.jsonl")
    assert rejected == []
    assert len(samples) == 90
    assert samples[0].turns[0][0] == "What is the color of the two suitcases in the image?"
    assert samples[0].turns[0][1].startswith("The colors of the two suitcases")


def test_what_vqa_writes_it_reads(tmp_path):
    assert vqa.write(tmp_path, [(5, "colour", "What color is it?", "red"), (5, "count", "How many?", "2")], "test") == 2
    samples, rejected = vqa.read(tmp_path / "vqa_questions.json", tmp_path / "vqa_annotations.json")
    assert rejected == []
    assert [(s.kind, s.references) for s in samples] == [("colour", ("red",) * 10), ("count", ("2",) * 10)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"question": " "}, "without text"),
        ({"image_id": 6}, "different images"),
        ({"question_id": [1]}, "bad id"),
        ({"question_id": 7}, "without annotation"),
    ],
)
def test_a_damaged_question_is_rejected_alone(tmp_path, change, reason):
    vqa.write(tmp_path, [(5, "colour", "What color is it?", "red"), (7, "count", "How many?", "2")], "test")
    path = tmp_path / "vqa_questions.json"
    document = json.loads(path.read_text())
    document["questions"][0].update(change)
    path.write_text(json.dumps(document))
    samples, rejected = vqa.read(path, tmp_path / "vqa_annotations.json")
    assert [sample.image_id for sample in samples] == ["7"]
    assert [reason in record.reason for record in rejected] == [True]


GOOD = {"img_path": "d/a.jpg", "expression": "the  dog ", "bbox": [1, 2, 30, 50], "width": 40, "height": 30}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [50, 50, 60, 60]}, "box outside image"),
        ({"bbox": [1, 2, 3]}, "bad box"),
        ({"bbox": [1, 2, None, 4]}, "bad box"),
        ({"expression": ""}, "no expression"),
        ({"width": 0}, "no width"),
        ({"img_path": None}, "no img_path"),
    ],
)
def test_a_damaged_expression_is_rejected_alone(tmp_path, change, reason):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | change) + "\n")
    samples, rejected = refcoco.read(path)
    assert [(s.image_id, s.question, s.box_xyxy) for s in samples] == [("a.jpg", "the dog", (1, 2, 30, 30))]
    assert reason in rejected[0].reason


def test_dialogues_alternate(tmp_path):
    good = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A dog."}]
    records = [
        {"id": "1", "image": "train/a.jpg", "conversations": good},
        {"id": "2", "image": "a.jpg", "conversations": good[::-1]},
        {"id": "3", "image": "a.jpg", "conversations": good[:1]},
        {"id": "4", "conversations": good},
        "nonsense",
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(records))
    samples, rejected = llava.read(path)
    assert [(sample.image_id, sample.turns) for sample in samples] == [("a.jpg", (("Who?", "A dog."),))]
    assert [r.record for r in rejected] == ["[1]", "[2]", "[3]", "[4]"]


def test_pope_lines_with_another_label_are_rejected(tmp_path):
    path = tmp_path / "pope.json"
    path.write_text('{"image": "a.jpg", "text": "Is there a dog in the image?", "label": "maybe"}\n"x"\n')
    samples, rejected = pope.read(path)
    assert samples == []
    assert [record.record for record in rejected] == ["line 1", "line 2"]


@settings(max_examples=50)
@given(st.dictionaries(st.text("abc", min_size=1), st.lists(st.sampled_from("pqrstuvw"), max_size=8), max_size=8))
def test_pope_asks_yes_and_no_evenly_and_truly(presence):
    lines = pope.sample(presence, list("pqrstuvw"), np.random.default_rng(0))
    for category in pope.CATEGORIES:
        labels = Counter(line["label"] for line in lines if line["category"] == category)
        assert labels["yes"] == labels["no"]
    for line in lines:
        name = line["text"].removesuffix(" in the image?")[-1]
        assert (name in presence[line["image"]]) == (line["label"] == "yes")


def test_adversarial_negatives_are_what_usually_comes_along():
    presence = (
        {f"{i}.jpg": ["fork", "knife"] for i in range(20)}
        | {"x.jpg": ["fork"]}
        | {f"b{i}.jpg": ["boat"] for i in range(30)}
    )
    lines = pope.sample(presence, ["boat", "fork", "knife", "zebra"], np.random.default_rng(0))
    negative = {line["category"]: line["text"] for line in lines if line["image"] == "x.jpg" and line["label"] == "no"}
    assert negative["adversarial"] == "Is there a knife in the image?"
    assert negative["popular"] == "Is there a boat in the image?"


def test_a_line_that_is_no_json_is_rejected_alone(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"a": }\n')
    first, second = json_lines(path)
    assert first == ("line 1", {"a": 1})
    assert second[0] == "line 2" and isinstance(second[1], BadRecordError)
    assert str(second[1]) == "not JSON: Expecting value at column 7"


def test_gzip_is_recognised_by_its_bytes_and_a_cut_one_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert list(json_lines(path)) == [("line 1", {"a": 1})]
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-9])
    with pytest.raises(InputError, match=r"x\.json cannot be read"):
        list(json_lines(path))


@given(st.text("ab./\\:", max_size=12))
def test_a_safe_name_never_leaves_its_folder(name):
    from pathlib import Path

    if is_safe_name(name):
        root = Path("/root/of/images")
        assert (root / name).resolve().is_relative_to(root)
