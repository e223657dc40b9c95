"""Pictures are looked at once, whatever is asked about them; settings of a model of other code are refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import QUESTIONS, seen, small_model, with_adapter

from lyrics import inference, io
from lyrics.errors import InputError
from lyrics.inference import Lyrics, Recent
from lyrics.model.language import Decoding


class Parts:
    """Stand-ins for the frozen parts, which count how often they are called."""

    settings = SimpleNamespace(feature_dtype="fp16")

    def __init__(self) -> None:
        self.encoded = self.refined = 0

    def preprocess(self, images: list[Image.Image]) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.asarray(image) for image in images]))

    def look(self, images: list[Image.Image], device: torch.device) -> torch.Tensor:
        return self(self.preprocess(images))

    def __call__(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        self.encoded += len(pixels_BHWC)
        flat_BX = pixels_BHWC.flatten(1).float()[:, :50]
        return (flat_BX / 128 - 1).reshape(-1, 5, 10)

    def refine(self, images: list[Image.Image], annotations: Any) -> list[SimpleNamespace]:
        self.refined += len(images)
        one = seen(2, 0)
        return [
            SimpleNamespace(
                tags=one.tags,
                boxes_xyxy=one.boxes_xyxy_N4,
                detector_tokens_ND=one.detector_tokens_ND,
                segmenter_tokens_ND=one.segmenter_tokens_ND,
                spatial_text=one.spatial_text,
            )
            for _ in images
        ]


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8))


def looking() -> tuple[Lyrics, Parts, list[int]]:
    """A small Lyrics, its counting parts, and the number of pictures in each call of MQ-Former's `look`."""
    parts: Any = Parts()
    model = with_adapter(small_model())
    looks: list[int] = []
    original = model.mq_former.look
    model.mq_former.look = lambda tokens, local: looks.append(len(tokens)) or original(tokens, local)  # type: ignore
    return Lyrics(model=model, encoder=parts, refiner=parts, label="small"), parts, looks


def test_a_second_question_does_not_pay_for_the_picture_again() -> None:
    lyrics, parts, looks = looking()
    answers = [lyrics.answer(picture(0), question, 6) for question in QUESTIONS]
    assert (parts.encoded, parts.refined, looks) == (1, 1, [1])
    fresh = [looking()[0].answer(picture(0), question, 6) for question in QUESTIONS]
    assert answers == fresh and len(set(answers)) > 1


def test_pictures_are_told_apart_by_their_pixels_and_the_oldest_is_forgotten() -> None:
    lyrics, parts, _ = looking()
    for number in (*range(inference.PICTURES_KEPT), 0):
        lyrics.answer(picture(number), QUESTIONS[0], 2)
    assert parts.encoded == inference.PICTURES_KEPT
    lyrics.answer(picture(99), QUESTIONS[0], 2)  # in the place of number 1, the one not used for longest
    lyrics.answer(picture(0), QUESTIONS[0], 2)
    assert parts.encoded == inference.PICTURES_KEPT + 1
    lyrics.answer(picture(1), QUESTIONS[0], 2)
    assert parts.encoded == inference.PICTURES_KEPT + 2
    assert lyrics.answer(picture(0), QUESTIONS[0], 6) != lyrics.answer(picture(1), QUESTIONS[0], 6)


def test_pictures_of_the_same_bytes_in_other_colours_are_told_apart() -> None:
    lyrics, parts, _ = looking()
    one, other = (picture(0).convert("P") for _ in range(2))
    other.putpalette([255 - value for value in one.getpalette() or ()])
    for image in (one, other, one):
        lyrics.answer(image, QUESTIONS[0], 2)
    assert one.tobytes() == other.tobytes() and parts.encoded == 2


def test_an_interrupted_answer_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    lyrics, _, _ = looking()
    layers = lyrics.model.language_layers
    stop = layers[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        lyrics.answer(picture(0), QUESTIONS[0], 5)
    stop.remove()
    history = [(QUESTIONS[0], "red")]
    expected = looking()[0].answer(picture(0), QUESTIONS[1], 5, history=history)
    assert lyrics.answer(picture(0), QUESTIONS[1], 5, history=history) == expected


@pytest.mark.parametrize(("out", "says"), [("scene.png", "is the picture itself"), (".", "is a folder")])
def test_a_picture_of_boxes_overwrites_neither_the_picture_nor_a_folder(tmp_path, monkeypatch, out, says) -> None:
    monkeypatch.setattr(inference, "load", lambda: pytest.fail("a model was loaded first"))
    picture(0).save(tmp_path / "scene.png")
    with pytest.raises(InputError, match=f"--boxes .*{says}; give the name of a PNG file to write"):
        inference.ask(tmp_path / "scene.png", QUESTIONS[:1], boxes=tmp_path / out)


def test_what_was_seen_can_be_asked_again_and_several_times_at_once() -> None:
    lyrics, parts, looks = looking()
    once = lyrics.see([picture(0), picture(1)])
    first = lyrics.answer_batch([QUESTIONS[0]], once[:1], max_new_tokens=6)
    second = lyrics.answer_batch([QUESTIONS[1]], once[:1], max_new_tokens=6)
    assert (parts.encoded, parts.refined, looks) == (2, 2, [1])
    together = lyrics.answer_batch(QUESTIONS, [once[0], once[0], once[1]], max_new_tokens=6)
    assert looks == [1, 2]
    assert together == [*first, *second, *lyrics.answer_batch(QUESTIONS[2:], once[1:], max_new_tokens=6)]


def test_a_dialogue_reads_its_history_and_a_new_question_does_not() -> None:
    lyrics, _, looks = looking()
    first = lyrics.answer(picture(0), QUESTIONS[0], 5)
    later = lyrics.answer(picture(0), QUESTIONS[1], 5, history=[(QUESTIONS[0], first)])
    assert later == looking()[0].answer(picture(0), QUESTIONS[1], 5, history=[(QUESTIONS[0], first)])
    assert later != lyrics.answer(picture(0), QUESTIONS[1], 5) and looks == [1]


def test_decoding_reaches_the_language_model() -> None:
    lyrics, _, _ = looking()
    for decoding in (Decoding(num_beams=4), Decoding(temperature=2.0, seed=3)):
        found = lyrics.answer(picture(0), QUESTIONS[0], 8, decoding)
        assert found == lyrics.answer_batch(QUESTIONS[:1], lyrics.see([picture(0)]), None, 8, decoding)[0]
        assert found != lyrics.answer(picture(0), QUESTIONS[0], 8)


def test_recent_makes_a_value_once_while_it_is_kept() -> None:
    made: list[str] = []
    recent: Recent[str] = Recent(2)
    for key in "abacb":
        assert recent.get(key, lambda key=key: made.append(key) or key) == key  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]


@pytest.mark.parametrize("settings", [{"refine": {"gone": 1}, "foundation": {}}, {"foundation": {}}])
def test_a_model_of_other_code_is_refused_in_a_sentence(tmp_path, settings):
    io.write_json(tmp_path / "config.json", settings)
    with pytest.raises(InputError, match=r"lyrics version 3 was trained by other code than this.*git_commit"):
        Lyrics.from_folders(tmp_path, tmp_path, device="cpu", label="lyrics version 3")
