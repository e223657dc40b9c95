"""Copies hold what they say, the clock counts each moment once and sees all that a step does with data."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from train import small_project

from benchmarks import features, features_quality, features_steps
from benchmarks.features import Access
from benchmarks.features_quality import Changed, Scored
from benchmarks.features_steps import PARTS, READING, TENSORS, TEXTS, Clock, Steps
from lyrics import io
from lyrics.errors import InputError
from lyrics.refiner.features import RefinedSplit, Tokens
from lyrics.refiner.precision import rounded
from lyrics.train import stage1


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_project.configuration()
    small_project.make(tmp_path, config)
    path = stage1.REFINED / "summary.json"
    io.write_json(path, io.read_json(path) | {"features": "cached", "feature_dtype": "fp16"})
    before = torch.are_deterministic_algorithms_enabled()
    yield config
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", features.DTYPES)
def test_a_copy_holds_the_stored_features_as_it_says(project, dtype, tmp_path):
    features.copy_project(tmp_path / "copy", dtype, project.refine.max_objects)
    for name, count in small_project.SPLITS.items():
        stored, copy = (RefinedSplit(folder / stage1.REFINED / name) for folder in (Path(), tmp_path / "copy"))
        assert copy.images == stored.images and copy.samples == stored.samples and len(copy) == count
        for image_id in stored.image_ids:
            one, other = stored.seen(image_id), copy.seen(image_id)
            for array in features_quality.ARRAYS.values():
                expected = rounded(getattr(one, array).astype(np.float32), dtype)
                np.testing.assert_array_equal(getattr(other, array), expected)


def test_a_conversion_that_changes_what_it_reads_is_found(project, tmp_path):
    split = RefinedSplit(stage1.REFINED / "web")
    with pytest.raises(AssertionError, match="in fp16 differs from"):
        features.convert(split, tmp_path / "copy", "fp16", project.refine.max_objects + 1)


@pytest.mark.parametrize(("changed", "found"), [("int8", "cached features in int8"), ("online", "online features")])
def test_a_project_that_the_others_cannot_be_made_of_is_refused(project, changed, found):
    path = stage1.REFINED / "summary.json"
    key = "features" if changed == "online" else "feature_dtype"
    io.write_json(path, io.read_json(path) | {key: changed})
    with pytest.raises(InputError, match=rf"{found}.*make run overrides='refine.features=cached"):
        features.check(project)


def test_a_picture_has_the_bytes_of_its_patches_and_objects(project):
    split = RefinedSplit(stage1.REFINED / "instruct")  # 14 pictures, row % 4 objects each
    objects = sum(row % 4 for row in range(14)) / 14
    patches, width, local = small_project.PATCHES, small_project.IMAGE_WIDTH, small_project.LOCAL_WIDTH
    assert features.picture_bytes(split, "fp16") == pytest.approx(2 * (patches * width + objects * 2 * local))
    assert features.picture_bytes(split, "int8") == pytest.approx(patches * (width + 4) + objects * 2 * (local + 4))
    array = small_project.PATCHES * width + small_project.MAX_OBJECTS * 2 * local
    assert 0 < features.disk_bytes(split.folder) - 14 * 2 * array < 3 * 200, "the rest are three headers"


def test_each_moment_counts_once_for_the_innermost_part(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(features_steps.time, "perf_counter", lambda: now[0])
    clock = Clock()

    def spend(seconds):
        now[0] += seconds

    read = clock.watch(READING, lambda: spend(1))
    ids = clock.watch(TEXTS, lambda: spend(2))

    def batch():
        ids()
        spend(4)
        read()
        ids()

    timed = clock.watch(TEXTS, batch)
    for _ in range(3):
        timed()
        spend(10)  # the network
        clock.log_metrics({}, step=1)
    clock.log_metrics({"quality": 1.0})
    assert clock.steps(warm_up=1) == Steps(19.0, {READING: 1.0, TEXTS: 8.0, TENSORS: 0.0})


def test_a_part_that_fails_is_left(monkeypatch):
    clock = Clock()

    def fail():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.watch(READING, fail)()
    before = clock.seconds.copy()
    clock.watch(TEXTS, lambda: None)()
    assert clock.seconds[READING] == before[READING]


def test_steps_of_both_stages_are_seen_with_all_their_parts(project, tmp_path):
    features.copy_project(tmp_path / "copy", "int8", project.refine.max_objects)
    before = [getattr(owner, name) for functions in PARTS.values() for owner, name in functions]
    found = features_steps.measure(project, {"int8": tmp_path / "copy"}, steps=2, warm_up=1)
    assert list(found) == [("stage1", "int8"), ("stage2", "int8")]
    for steps in found.values():
        assert set(steps.parts) == {READING, TEXTS, TENSORS} and min(steps.parts.values()) > 0
        assert sum(steps.parts.values()) < steps.step
    assert [getattr(owner, name) for functions in PARTS.values() for owner, name in functions] == before


def test_errors_are_of_all_tokens_together():
    draw = np.random.default_rng(0)
    pictures = [
        Tokens(
            image_tokens_PD=draw.normal(size=(50, 192)).astype(np.float32),
            detector_tokens_ND=np.full((count, 4), [127.0, 0.5, 64, 1], np.float32),
            segmenter_tokens_ND=np.full((count, 1), 3.0, np.float32),
        )
        for count in (0, 2)
    ]
    found = features_quality.relative_errors(pictures)
    assert found["fp16"]["image_tokens"] < 2.1e-4 < found["bf16"]["image_tokens"] < 1.7e-3
    assert 1.7e-3 < found["int8"]["image_tokens"] < 8e-3
    # A step of int8 is 1 here: 0.5 becomes 0, all else is kept.
    assert found["int8"]["detector_tokens"] == pytest.approx(0.5 / np.linalg.norm([127, 0.5, 64, 1]))
    assert found["fp16"]["segmenter_tokens"] == found["bf16"]["segmenter_tokens"] == 0
    without_objects = features_quality.relative_errors(pictures[:1])
    assert without_objects["int8"]["detector_tokens"] is None and without_objects["int8"]["image_tokens"]


def test_answers_are_compared_sample_by_sample():
    stored = Scored({}, {"a": "red", "b": "2", "c": "yes"}, {"a": 1.0, "b": 0.0, "c": 1.0})
    other = Scored({}, {"a": "blue", "b": "3", "c": "yes"}, {"a": 0.0, "b": 0.3, "c": 1.0})
    assert features_quality.compare(stored, other) == Changed(other=2, better=1, worse=1)
    assert features_quality.compare(stored, stored) == Changed(0, 0, 0)


def test_tables_have_a_row_for_each():
    access = {
        "fp16": Access(2**21, 4000.0, [2e-4, 1e-4, 1e-4], [1e-4, 1e-4, 1e-4], [1e-3, 2e-4, 3e-4]),
        "int8": Access(2**20, 2000.0, [1e-4, 5e-5, 5e-5], [2e-4, 2e-4, 2e-4], [4e-4] * 3),
    }
    assert features.access_table(access).splitlines()[2:] == [
        "| fp16 | 2.0 | 10000 | 40 |  | 10000 | 40 |  | 0.30 |",
        "| int8 | 1.0 | 20000 | 40 | 2.00 × | 5000 | 10 | 0.50 × | 0.40 |",
    ]
    steps = {("stage1", "fp16"): Steps(0.25, {READING: 0.005, TEXTS: 0.0025, TENSORS: 0.0025})}
    assert features.steps_table(steps).splitlines()[2:] == ["| stage1 | fp16 | 250 | 10.0 | 4.0% | 5.0 | 2.5 | 2.5 |"]
    errors = {"fp16": {"image_tokens": 2e-4}, "int8": {"image_tokens": 7.5e-3}}
    assert features.errors_table(errors).splitlines()[2:] == ["| fp16 | 0.02% |", "| int8 | 0.75% |"]
    assert features.errors_table({"fp16": {"image_tokens": None}}).splitlines()[2:] == ["| fp16 | – |"]
    one = Scored({"vqa_accuracy": 0.5}, {"a": "red", "b": "2"}, {"a": 1.0, "b": 0.0})
    other = Scored({"vqa_accuracy": 0.0}, {"a": "blue", "b": "2"}, {"a": 0.0, "b": 0.0})
    assert features.scores_table({("val", "fp16"): one, ("val", "int8"): other}).splitlines()[2:] == [
        "| val | fp16 | 0.500 |  |  |  |",
        "| val | int8 | 0.000 | 1 of 2 | 0 | 1 |",
    ]
    assert features.alignment_table({"fp16": {"itm_accuracy": 0.97}}).splitlines()[2:] == ["| fp16 | 0.970 |"]


def test_the_document_gets_what_was_measured(project, tmp_path, monkeypatch):
    seen = {dtype: dict.fromkeys(features_quality.ARRAYS, 0.01) for dtype in features.DTYPES}
    monkeypatch.setattr(features_quality, "errors", lambda *_: seen)  # the small project has no encoder
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- features -->\n<!-- /features -->\nafter\n")
    features.main(["--pictures", "8", "--rounds", "1", "--steps", "1", "--warm-up", "1", "--write", str(document)])
    rows = re.findall(r"^\| (?:(stage\d) \| )?(\w+) \| [\d.]", document.read_text(), re.MULTILINE)
    read = [("", dtype) for dtype in features.DTYPES]
    steps = [(stage, dtype) for stage in ("stage1", "stage2") for dtype in features.DTYPES]
    assert rows == [*read, *steps, *read]
    assert "8 pictures of 14, batches of 8" in document.read_text()
    assert not list(Path("build").glob("features-*"))
    assert dataclasses.asdict(project)["refine"]["feature_dtype"] == "fp16"
