import csv
import shutil

import pyarrow.parquet as pq
import pytest
from evaluated_project import FakeModel, configured

from lyrics import io
from lyrics.data.prompts import instruction, target
from lyrics.errors import InputError
from lyrics.evaluate import evaluate, tasks
from lyrics.refiner.features import RefinedSplit
from lyrics.stage import NullTracker


@pytest.fixture
def small(project):
    _, config = project
    return configured(config, splits=("test", "test_ood"), samples_per_split=12, gallery_size=6)


class Recorder(NullTracker):
    def __init__(self):
        self.metrics, self.datasets, self.artifacts = {}, [], []

    def log_metrics(self, values, step=None):
        self.metrics |= values

    def log_dataset(self, name, path, sha256):
        self.datasets.append(name)

    def log_artifact(self, path):
        self.artifacts.append(path.name)


def perfect(split_name):
    split = RefinedSplit(evaluate.REFINED / split_name)
    answers = {}
    for sample in split.samples:
        image = split.images[sample.image_id]
        answers[instruction(sample), image.spatial_text] = target(sample, image.width, image.height, "grid100")
    return FakeModel(answers, hit_rate=1.0)


def test_a_perfect_model_scores_one_and_its_baselines_do_not(small, tmp_path):
    tracker = Recorder()
    evaluate.run(configured(small, splits=("test",)), tmp_path, tracker, perfect("test"))
    found = io.read_json(tmp_path / "out/evaluation.json")
    scores = found["splits"]["test"]
    for metric in ("vqa_accuracy", "refer_accuracy", "pope_accuracy"):
        assert scores[metric]["model"] == 1.0
        assert scores[metric]["n"] == 12
        assert max(scores[metric][system] for system in ("most_frequent", "other_image")) < 0.8
        assert scores[metric]["low"] == scores[metric]["high"] == 1.0
    assert scores["cider"]["model"] > 2 * scores["cider"]["other_image"]
    assert scores["refer_unparsable"]["model"] == 0
    assert found["tokenizer"] and "spice" in found["absent"]
    assert tracker.metrics["eval/test/vqa_accuracy"] == 1.0
    assert "eval/test/vqa_accuracy.other_image" in tracker.metrics
    assert tracker.datasets == ["test"]
    assert tracker.artifacts == ["evaluation.json", "index.html"]


def test_per_sample_scores_average_to_the_reported_ones(small, tmp_path):
    evaluate.run(small, tmp_path, NullTracker(), FakeModel())
    found = io.read_json(tmp_path / "out/evaluation.json")["splits"]
    for split in ("test", "test_ood"):
        rows = pq.read_table(tmp_path / f"out/samples/{split}.parquet").to_pylist()
        for task, metric in tasks.HEADLINE.items():
            of_task = [row for row in rows if row["task"] == task]
            for system in tasks.SYSTEMS:
                column = "score" if system == "model" else f"score_{system}"
                mean = sum(row[column] for row in of_task) / len(of_task)
                assert mean == pytest.approx(found[split][metric][system], abs=2e-6)
    with (tmp_path / "out/plots/scores.csv").open() as opened:
        bars = list(csv.DictReader(opened))
    assert len(bars) == 2 * 4 * 4
    with (tmp_path / "out/plots/stage1.csv").open() as opened:
        assert set(next(csv.DictReader(opened))) == {
            "step",
            "itc_loss",
            "itc_loss_chance",
            "itm_loss",
            "itm_loss_chance",
        }


def test_each_baseline_sees_what_it_should(small, tmp_path):
    model = FakeModel()
    small = configured(small, splits=("test",), batch_size=100)
    evaluate.run(small, tmp_path, NullTracker(), model)
    split = RefinedSplit(evaluate.REFINED / "test")
    asked = tasks.choose(split.samples, "vqa", 12, small.seed, "test")
    own = sorted((instruction(s), split.images[s.image_id].spatial_text) for s in asked)
    model_call, other_image, other_features = (sorted(zip(*call, strict=True)) for call in model.calls[:3])
    assert model_call == own
    assert other_features == own  # its own text, though another image's features
    assert [question for question, _ in other_image] == [question for question, _ in own]
    assert other_image != own


def test_other_features_come_from_another_image(small, tmp_path):
    class Watching(FakeModel):
        def answer_batch(self, questions, seen, spatial_texts=None, max_new_tokens=32):
            if spatial_texts is not None:
                pairs.extend(zip(seen, spatial_texts, strict=True))
            return super().answer_batch(questions, seen, spatial_texts, max_new_tokens)

    pairs: list = []
    evaluate.run(configured(small, splits=("test",)), tmp_path, NullTracker(), Watching())
    assert len(pairs) == 4 * 12
    assert all(seen.spatial_text != text for seen, text in pairs)


def test_outputs_are_byte_stable_and_an_interrupted_run_asks_only_what_is_missing(small, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    evaluate.run(small, first, NullTracker(), FakeModel())
    model = FakeModel()
    shutil.copytree(first / "answers", second / "answers")
    next((second / "answers").glob("*/test-vqa-model.json")).unlink()
    evaluate.run(small, second, NullTracker(), model)
    assert sum(len(questions) for questions, _ in model.calls) == 12
    files = sorted(p.relative_to(first / "out") for p in (first / "out").rglob("*") if p.is_file())
    assert len(files) == 7
    assert [(first / "out" / f).read_bytes() for f in files] == [(second / "out" / f).read_bytes() for f in files]


def test_answers_of_another_model_are_not_reused(small, tmp_path, monkeypatch):
    small = configured(small, splits=("test_ood",))
    evaluate.run(small, tmp_path, NullTracker(), FakeModel())
    retrained = tmp_path / "stage2"
    retrained.mkdir()
    (retrained / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr(evaluate, "STAGE2", retrained)
    model = FakeModel()
    evaluate.run(small, tmp_path, NullTracker(), model)
    assert len(model.calls) == 4 * 3
    assert len(list((tmp_path / "answers").iterdir())) == 1


def test_full_run_asks_everything(small, tmp_path):
    evaluate.run_full(configured(small, splits=("test_ood",)), tmp_path, NullTracker(), FakeModel())
    found = io.read_json(tmp_path / "out/evaluation.json")
    samples = RefinedSplit(evaluate.REFINED / "test_ood").samples
    assert found["samples_per_split"] is None
    assert found["splits"]["test_ood"]["pope_accuracy"]["n"] == sum(s.task == "pope" for s in samples) > 12


def test_absent_tasks_and_splits_are_named_with_their_reason(small, tmp_path, monkeypatch):
    from lyrics.refiner import features

    kept = [s for s in RefinedSplit(evaluate.REFINED / "test").samples if s.task == "caption"]
    refined = tmp_path / "refined"
    shutil.copytree(evaluate.REFINED / "test", refined / "test")
    features.write_samples(refined / "test" / features.SAMPLES_FILE, kept)
    monkeypatch.setattr(evaluate, "REFINED", refined)
    evaluate.run(configured(small, splits=("val", "test")), tmp_path, NullTracker(), FakeModel())
    found = io.read_json(tmp_path / "out/evaluation.json")
    assert set(found["splits"]) == {"test"}
    assert not any(metric.startswith(("vqa", "pope", "refer")) for metric in found["splits"]["test"])
    assert "no vqa samples" in found["absent"]["test/vqa_accuracy"]
    assert "does not exist" in found["absent"]["val"]
    assert found["splits"]["test"]["cider"]["most_frequent"] is None
    assert "most_frequent" in found["absent"]


def test_no_split_at_all_is_refused(small, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"none of the splits.*\(dev\).*found: instruct, test, test_ood.*lyrics refine"
    ):
        evaluate.run(configured(small, splits=("dev",)), tmp_path, NullTracker(), FakeModel())
