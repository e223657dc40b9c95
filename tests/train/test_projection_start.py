"""The start of the projection in stage 2: which outputs it learns from, and what they are told."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.train.projection_start import start_projection

WORDS = ["red", "dark", "two", " red", " dark", " two", "</s>"]
TAGS = {"a": ("star", "cup"), "b": ("cup", "cup", "star"), "c": ("cupboard", "traffic light", "star")}


class Recorder(torch.nn.Module):
    """A projection that keeps what it would have learned from."""

    def start_from(self, *tensors: torch.Tensor) -> None:
        self.spread_of = tensors

    def start_from_answers(self, *tensors: torch.Tensor) -> None:
        self.given = tensors


def asked(image_id: str, question: str, *answers: str, kind: str = "colour") -> Sample:
    name = f"{kind}-{image_id}"
    return Sample(sample_id=name, image_id=image_id, task="vqa", kind=kind, question=question, references=answers)


def project(*samples: Sample, damaged: str = "", beside: bool = True) -> tuple[Any, Any]:
    """A model of one visual and two grounding queries; output q of picture p is 10 p + q."""

    def outputs(instructions: list[str], seen: list[Any]) -> torch.Tensor:
        assert not mq_former.training  # dropout
        model.read = instructions
        rows = [10.0 * "abc".index(one.name) + torch.arange(3.0) for one in seen]
        return torch.stack(rows)[..., None].expand(-1, -1, 2)

    def see(image_ids: list[str]) -> list[Any]:
        return [SimpleNamespace(name=i, is_finite=lambda i=i: i != damaged) for i in image_ids]

    def answer(text: str) -> list[int]:
        return [*map(WORDS.index, re.findall(" ?[^ ]+", text)), WORDS.index("</s>")]

    def batch(step: int, size: int) -> Any:
        return SimpleNamespace(ids=("x",), instructions=["What?"], seen=see(["c"]))

    mq_former = torch.nn.Module()
    mq_former.config = SimpleNamespace(visual_queries=1, grounding_queries=2)  # type: ignore[assignment]
    embeddings = SimpleNamespace(weight=torch.eye(len(WORDS)))
    model = SimpleNamespace(
        mq_former=mq_former,
        projection=Recorder(),
        llm=SimpleNamespace(get_input_embeddings=lambda: embeddings),
        tokens_beside_objects=beside,
        query_outputs=outputs,
        template=SimpleNamespace(answer=answer),
    )
    images = {name: SimpleNamespace(tags=tags) for name, tags in TAGS.items()}
    split = SimpleNamespace(samples=samples, images=images, see=see)
    return model, SimpleNamespace(split=split, first=SimpleNamespace(kinds=("colour",)), batch=batch)


def test_an_objects_output_is_told_the_answer_about_it() -> None:
    model, data = project(
        asked("a", "What color is the cup?", "red"),
        asked("b", "What color is the cup?", "red"),  # of two cups
        asked("b", "How many stars, or what star?", "two", kind="count"),  # told by the text
        asked("b", "What color is the Star?", "dark red", "red"),
        asked("a", "What color is the cupboard?", "red"),  # the cup is another thing
        asked("c", "Is the star under the traffic light?", "red"),  # of two objects
        asked("c", "What color is the traffic light?", "dark"),
    )
    start_projection(model, data, torch.device("cpu"))
    query_XD, answer_XE, words_VE = model.projection.given
    # Two queries for three objects: the third shares the first one's.
    assert query_XD[:, 0].tolist() == [2, 11, 22]
    assert model.read == ["What color is the cup?", "What color is the Star?", "What color is the traffic light?"]
    # As words stand within a text, and none of its end; the mean over answers.
    red, dark = (words_VE[WORDS.index(word)] - words_VE.mean(0) for word in (" red", " dark"))
    torch.testing.assert_close(answer_XE, torch.stack([red, (dark + red + red) / 2, dark]))


def test_one_answer_tells_nothing_apart() -> None:
    cup, star = (asked(i, f"What color is the {tag}?", "red") for i, tag in (("a", "cup"), ("b", "star")))
    for samples in ((cup,), (cup, star)):
        model, data = project(*samples)
        start_projection(model, data, torch.device("cpu"))
        assert not hasattr(model.projection, "given")


@pytest.mark.parametrize("beside", [False, True])
def test_without_answers_about_single_objects_it_is_the_spread_that_tells(beside: bool) -> None:
    sample = asked("a", "What color is the cup?" if not beside else "What color is it?", "red")
    model, data = project(sample, beside=beside)
    start_projection(model, data, torch.device("cpu"))
    assert not hasattr(model.projection, "given")
    assert model.projection.spread_of[0][:, :, 0].tolist() == [[20, 21, 22]]


def test_features_that_are_not_finite_are_named() -> None:
    samples = (asked(i, "What color is the star?", answer) for i, answer in (("b", "red"), ("c", "dark")))
    model, data = project(*samples, damaged="b")
    with pytest.raises(InputError, match=r"features of colour-b are not finite.*python -m lyrics refine"):
        start_projection(model, data, torch.device("cpu"))
