"""How tasks are mixed, and what the language model is shown of a picture's objects."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.seeding import rng
from lyrics.train.stage2_batches import NO_FIRST, First, Stage2Data, _choose, mixing_weights


def test_without_shares_tasks_mix_by_the_square_root_of_their_size() -> None:
    assert mixing_weights({"caption": 100, "vqa": 900}, "sqrt") == {"caption": 0.25, "vqa": 0.75}


def test_shares_are_scaled_to_the_tasks_that_the_data_has() -> None:
    found = mixing_weights({"caption": 10, "vqa": 10, "chat": 5}, {"caption": 0.2, "vqa": 0.6, "refer": 0.2})
    assert found == pytest.approx({"caption": 0.25, "vqa": 0.75})


def test_as_given_every_sample_is_as_likely() -> None:
    assert mixing_weights({"caption": 100, "vqa": 900}, "as_given") == {"caption": 0.1, "vqa": 0.9}


def test_sources_mix_as_tasks_do() -> None:
    def asked(number: int, source: str) -> Sample:
        known = {"sample_id": f"{source}{number}", "question": f"{source} {number}?", "source": source}
        return Sample(image_id="1", task="vqa", kind="vqa", references=("1",), **known)

    samples = (*(asked(i, "small") for i in range(4)), *(asked(i, "large") for i in range(36)))
    for shares, expected in (("sqrt", 0.25), ("as_given", 0.1), ({"small": 0.6, "large": 0.4}, 0.6)):
        mixed = data(samples, first=NO_FIRST, shares=shares, mix_by="source")
        ids = mixed.batch(0, 4000).ids
        assert sum(i.startswith("small") for i in ids) / len(ids) == pytest.approx(expected, abs=0.025)
        assert len(set(ids)) == 40


def test_any_sample_of_any_step_is_had_alone_and_again() -> None:
    through = [data(first=NO_FIRST, turns=2).batch(step, 4) for step in range(6)]
    resumed = data(first=NO_FIRST, turns=2)
    assert [resumed.batch(step, 4) for step in (5, 3, 4)] == [through[5], through[3], through[4]]
    assert resumed.batch(3, 2) == through[3].part(slice(0, 2))
    assert len({batch.ids for batch in through}) > 1


def test_shares_that_no_task_has_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"shares names refer, but the data has only caption"):
        mixing_weights({"caption": 10}, {"refer": 1.0})


SAMPLES = (
    Sample(sample_id="c", image_id="1", task="caption", kind="caption", references=("A red cup.",)),
    Sample(sample_id="v", image_id="1", task="vqa", kind="colour", question="What color?", references=("red",)),
    Sample(sample_id="r", image_id="1", task="refer", kind="refer", question="the cup", box_xyxy=(0.0, 0.0, 5.0, 5.0)),
)


CAPTIONS = First(3, ("caption",), without_spatial=1.0)


def data(samples: tuple[Sample, ...] = SAMPLES, **changes: Any) -> Stage2Data:
    image = SimpleNamespace(width=10, height=10, spatial_text="cup 0 0 50 50;")
    split: Any = SimpleNamespace(samples=list(samples), images={"1": image})
    settings = {"shares": "sqrt", "without_spatial": 0.5, "spatial_text_in_llm": True, "first": CAPTIONS, "seed": 0}
    return Stage2Data(split, coordinate_format="grid100", **{**settings, **changes})


def test_the_first_steps_are_captions_without_spatial_text() -> None:
    for step in range(3):
        batch = data().batch(step, 20)
        assert set(batch.ids) == {"c"} and set(batch.spatial_texts) == {""}
    assert set(data().batch(3, 60).ids) == {"c", "v", "r"}


def test_data_without_captions_begins_with_its_tasks() -> None:
    batch = data(SAMPLES[1:], without_spatial=0.0).batch(0, 40)
    assert set(batch.ids) == {"v", "r"} and all(batch.spatial_texts)


def test_boxes_are_asked_for_with_the_spatial_text_and_the_rest_half_of_the_time() -> None:
    batch = data(first=NO_FIRST).batch(0, 200)
    shown = {i: [bool(t) for n, t in zip(batch.ids, batch.spatial_texts, strict=True) if n == i] for i in "cvr"}
    assert all(shown["r"]) and 0.3 < sum(shown["c"] + shown["v"]) / len(shown["c"] + shown["v"]) < 0.7
    assert not any(data(first=NO_FIRST, spatial_text_in_llm=False).batch(0, 40).spatial_texts)


def test_a_dialogue_is_learnt_whole() -> None:
    turns = (("What is there?", "A cup."), ("Tell me more.", "It is red."))
    chat = Sample(sample_id="d", image_id="1", task="chat", kind="chat", turns=turns)
    batch = data((chat,)).batch(3, 2)
    assert batch.instructions == [("What is there?", "Tell me more.")] * 2
    assert batch.answers == [("A cup.", "It is red.")] * 2


def test_the_first_steps_draw_from_their_kinds_with_a_share_of_their_own() -> None:
    batch = data(first=First(1, ("colour",), without_spatial=0.0), without_spatial=1.0, turns=3).batch(0, 20)
    assert set(batch.ids) == {"v"} and set(batch.answers) == {("red",)} and all(batch.spatial_texts)


def test_questions_about_a_picture_make_one_sample_and_none_comes_twice() -> None:
    again = Sample(**{**vars(SAMPLES[1]), "sample_id": "w"})  # the same question under another id
    other = Sample(sample_id="x", image_id="2", task="vqa", kind="count", question="How many?", references=("1",))
    found = data((*SAMPLES, again, other), first=NO_FIRST, turns=4)
    found.split.images["2"] = found.split.images["1"]
    seen = set()
    for step in range(10):
        batch = found.batch(step, 20)
        for sample, asked, said in zip(batch.ids, batch.instructions, batch.answers, strict=True):
            seen.add((sample, frozenset(asked)))
            assert len(asked) == len(said) == len(set(asked))
    both = frozenset({"What color?", "Where is the cup?"})
    assert seen == {
        ("c", frozenset({"Describe the image."})),
        ("v", both),
        ("w", both),
        ("r", both),
        ("x", frozenset({"How many?"})),
    }


def test_a_group_is_drawn_as_numpy_draws_it() -> None:
    for seed in range(300):
        weight_T = rng(seed, "weights").random(1 + seed % 6)
        weights = {str(place): float(weight) for place, weight in enumerate(weight_T)}
        expected = rng(seed, "draw").choice(len(weight_T), p=weight_T / np.sum(weight_T))
        assert _choose(weights, rng(seed, "draw")) == str(expected)
    assert {_choose({"a": 0.0, "b": 2.0, "c": 0.0}, rng(seed)) for seed in range(50)} == {"b"}
