"""The start of the projection in stage 2: which outputs it learns from, and what they are told."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lyrics.data.records import Sample
from lyrics.errors import InputError
from lyrics.train.projection_start import start_projection

WORDS = ["cup", "red", "blue", "and", "</s>"]
TAGS = {"a": ("cup",), "b": ("cup", "cup"), "c": ()}


class Recorder(torch.nn.Module):
    """A projection that keeps what it would have learned from."""

    def start_from_captions(self, *tensors: torch.Tensor) -> None:
        self.given = tensors


def caption(image_id: str, *texts: str) -> Sample:
    return Sample(sample_id=f"caption-{image_id}", image_id=image_id, task="caption", kind="caption", references=texts)


def project(damaged: str = "") -> tuple[Any, Any]:
    """A model of one visual and three grounding queries; output q of picture p is 10 p + q."""

    def outputs(_: list[str], seen: list[Any]) -> torch.Tensor:
        assert not mq_former.training  # dropout
        rows = [10.0 * "abc".index(one.name) + torch.arange(4.0) for one in seen]
        return torch.stack(rows)[..., None].expand(-1, -1, 2)

    def see(image_ids: list[str]) -> list[Any]:
        return [SimpleNamespace(name=i, tags=TAGS[i], is_finite=lambda i=i: i != damaged) for i in image_ids]

    mq_former = torch.nn.Module()
    mq_former.config = SimpleNamespace(visual_queries=1)  # type: ignore[assignment]
    embeddings = SimpleNamespace(weight=torch.eye(len(WORDS)))
    model = SimpleNamespace(
        mq_former=mq_former,
        projection=Recorder(),
        llm=SimpleNamespace(get_input_embeddings=lambda: embeddings),
        tokens_beside_objects=True,
        query_outputs=outputs,
        template=SimpleNamespace(answer=lambda text: [WORDS.index(w) for w in f"{text} </s>".split()]),
    )
    samples = [caption("a", "red cup"), caption("b", "red cup and blue cup", "blue cup"), caption("c", "blue")]
    return model, SimpleNamespace(split=SimpleNamespace(samples=samples, see=see))


def test_each_objects_output_is_told_what_no_tag_says() -> None:
    model, data = project()
    start_projection(model, data, torch.device("cpu"))
    query_XD, picture_X, said_PE, words_VE = model.projection.given
    assert query_XD[:, 0].tolist() == [1, 11, 12] and picture_X.tolist() == [0, 1, 1]
    mean_E = words_VE.mean(0)
    red, blue, joined = (words_VE[WORDS.index(word)] - mean_E for word in ("red", "blue", "and"))
    # A tag ends as an answer does, so no end is left; of the third picture there is no output to tell.
    np.testing.assert_allclose(said_PE[:2], torch.stack([red, (red + joined + blue + blue) / 2]), atol=1e-6)


def test_a_tag_is_known_within_a_text_where_it_is_another_word() -> None:
    """Byte-level vocabularies tell "cup", the start of a text, from " cup"."""
    words = [*WORDS, *(f" {word}" for word in WORDS)]
    model, data = project()
    model.llm = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.eye(len(words))))
    model.template = SimpleNamespace(
        answer=lambda text: [*map(words.index, re.findall(" ?[^ ]+", text)), words.index("</s>")]
    )
    start_projection(model, data, torch.device("cpu"))
    said_PE, words_VE = model.projection.given[2:]
    torch.testing.assert_close(said_PE[0], words_VE[words.index("red")] - words_VE.mean(0))  # of "red cup"


def test_features_that_are_not_finite_are_named() -> None:
    model, data = project(damaged="b")
    with pytest.raises(InputError, match=r"features of caption-b are not finite.*python -m lyrics refine"):
        start_projection(model, data, torch.device("cpu"))
