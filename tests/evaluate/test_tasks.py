import collections

import numpy as np
import pytest

from lyrics.data.records import Sample
from lyrics.evaluate import baselines, tasks
from lyrics.refiner.features import RefinedImage
from lyrics.refiner.spatial_text import parse_box


def vqa(name, kind="colour", answer="red", image="i1"):
    return Sample(sample_id=name, image_id=image, task="vqa", kind=kind, question="?", references=(answer,) * 10)


def refer(name, box, image="i1"):
    return Sample(sample_id=name, image_id=image, task="refer", kind="refer", question="the star", box_xyxy=box)


def picture(name="i1", width=200, height=100):
    nothing: dict = dict.fromkeys(("captions", "tags", "boxes_xyxy", "scores", "masks"), ())
    return RefinedImage(
        image_id=name, path="x.jpg", width=width, height=height, **nothing, spatial_text="", shard=0, row=0
    )


def constant(text, count):
    return dict.fromkeys(tasks.SYSTEMS, [text] * count)


def test_choice_is_proportional_reproducible_and_independent_of_the_rest():
    samples = [vqa(f"c{i}", "colour") for i in range(60)] + [vqa(f"n{i}", "count") for i in range(30)]
    chosen = tasks.choose(samples, "vqa", 10, 0, "test")
    assert collections.Counter(s.kind for s in chosen) == {"colour": 7, "count": 3}
    assert chosen == tasks.choose([*samples, refer("r", (0, 0, 1, 1))], "vqa", 10, 0, "test")
    assert chosen != tasks.choose(samples, "vqa", 10, 1, "test")
    assert tasks.choose(samples, "vqa", None, 0, "test") == samples
    assert tasks.choose(samples, "pope", 10, 0, "test") == []


def test_pope_keeps_half_yes():
    samples = [
        Sample(sample_id=f"{kind}{i}", image_id="i", task="pope", kind=kind, references=("yes" if i % 2 else "no",))
        for kind in ("random", "popular")
        for i in range(50)
    ]
    chosen = tasks.choose(samples, "pope", 40, 0)
    assert collections.Counter((s.kind, s.references) for s in chosen) == {
        (kind, (label,)): 10 for kind in ("random", "popular") for label in ("yes", "no")
    }


def test_refer_boxes_are_scaled_to_the_image_and_nonsense_is_wrong_and_counted():
    samples = [refer("a", (20, 10, 60, 50)), refer("b", (20, 10, 60, 50)), refer("c", (20, 10, 60, 50))]
    answers = constant("x", 3) | {"model": ["10 10 30 50", "in the corner", "10 10 12 12"]}
    found = tasks.score("refer", samples, answers, {"i1": picture()}, "grid100")
    assert found.each["model"] == [1.0, 0.0, 0.0]
    assert found.metrics["refer_accuracy"]["model"] == pytest.approx(1 / 3)
    assert found.metrics["refer_unparsable"]["model"] == pytest.approx(1 / 3)
    assert found.metrics["refer_unparsable"]["other_image"] == 1.0


def test_vqa_is_broken_down_by_kind():
    samples = [vqa("a", "colour", "red"), vqa("b", "colour", "blue"), vqa("c", "count", "2")]
    answers = constant("red", 3) | {"model": ["red", "red", "2"], "most_frequent": None}
    metrics = tasks.score("vqa", samples, answers, {}, "grid100").metrics
    assert metrics["vqa_accuracy"]["model"] == pytest.approx(2 / 3)
    assert metrics["vqa_accuracy/colour"] == {
        "model": 0.5,
        "most_frequent": None,
        "other_image": 0.5,
        "other_features": 0.5,
        "n": 2,
    }
    assert metrics["vqa_accuracy/count"]["model"] == 1.0


def test_captions_score_each_picture_and_their_mean_is_the_corpus_score():
    texts = ["a red star above a cup", "two blue anchors on a green ground", "a small horse", "an orange gear at left"]
    samples = [
        Sample(sample_id=str(i), image_id=str(i), task="caption", kind="caption", references=(text, "a picture"))
        for i, text in enumerate(texts)
    ]
    answers = constant("a picture", 4) | {"model": texts}
    found = tasks.score("caption", samples, answers, {}, "grid100")
    assert np.mean(found.each["model"]) == pytest.approx(found.metrics["cider"]["model"])
    assert found.metrics["cider"]["model"] > 4 > found.metrics["cider"]["other_image"]
    assert found.metrics["bleu_4"]["model"] == pytest.approx(1.0)
    assert "meteor" not in found.metrics


def test_other_images_are_a_derangement():
    names = [str(i) for i in range(50)]
    others = baselines.other_images(names, 0, "test")
    assert others is not None
    assert sorted(others.values()) == sorted(names)
    assert all(name != other for name, other in others.items())
    assert others == baselines.other_images(reversed(names), 0, "test")
    assert baselines.other_images(["only"], 0) is None
    assert baselines.other_images(["a", "b"], 0) == {"a": "b", "b": "a"}


def test_most_frequent_answers_are_those_of_their_kind():
    training = [vqa("a", "colour", "red"), vqa("b", "colour", "red"), vqa("c", "colour", "blue")]
    training += [vqa("d", "exists", "yes"), vqa("e", "exists", "no"), vqa("f", "exists", "no")]
    constant = baselines.MostFrequent(training, {}, "grid100")
    assert constant.answer(vqa("x", "colour")) == "red"
    assert constant.answer(vqa("x", "exists")) == "no"
    assert constant.answer(vqa("x", "unheard of")) == "no"  # ties go by the alphabet: no, red
    asked = Sample(sample_id="p", image_id="i", task="pope", kind="random")
    assert constant.answer(asked) == "no"  # no pope questions in training: its yes/no questions
    assert constant.answer(refer("r", (0, 0, 1, 1))) is None


def test_most_frequent_box_overlaps_most_training_boxes():
    boxes = [(0, 0, 100, 50), (2, 0, 98, 50), (0, 1, 100, 49), (150, 80, 160, 90)]
    training = [refer(str(i), box) for i, box in enumerate(boxes)]
    answer = baselines.MostFrequent(training, {"i1": picture()}, "grid100").answer(training[0])
    box = parse_box(answer, "grid100")
    assert box == pytest.approx((0, 0, 0.5, 0.5), abs=0.02)


def test_consensus_caption():
    assert baselines.consensus_caption(["b", "a b", "b"]) == "b"
    assert baselines.consensus_caption(["a dog runs", "a dog sits", "two pizzas", "a dog"]) == "a dog"
