"""Masked spatial prediction is scored for tags and for boxes apart; retrieval gives nothing for being undecided."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lyrics.train.losses import IGNORED
from lyrics.train.stage1_batches import SpatialIds
from lyrics.train.stage1_quality import _masked_spatial, _retrieval

TAG, BOX, WRONG, COLON = 5, 6, 7, 8


def test_the_tokens_of_tags_are_known() -> None:
    spatial = SpatialIds(ids=[TAG, TAG, COLON, BOX, BOX, COLON, TAG, BOX], tag_spans=[(0, 2), (6, 7)], box_spans=[])
    assert spatial.in_tag == [True, True, False, False, False, False, True, False]


def objectives(predicted: list[int], labels: list[int], max_text_tokens: int = 32) -> Any:
    logits_MV = torch.nn.functional.one_hot(torch.tensor(predicted), 10).float()
    config = SimpleNamespace(max_text_tokens=max_text_tokens)
    return SimpleNamespace(
        mq_former=SimpleNamespace(config=config),
        look=lambda batch: None,
        masked_spatial_logits=lambda batch, looked: (logits_MV, torch.tensor(labels)),
    )


def test_accuracy_is_split_by_tags_and_boxes() -> None:
    batch: Any = SimpleNamespace(
        msp_labels=[[TAG, IGNORED, BOX, BOX], [IGNORED, TAG, IGNORED, BOX]],
        msp_in_tag=[[True, False, False, False], [False, True, True, False]],
    )
    found = _masked_spatial(objectives([TAG, BOX, WRONG, WRONG, BOX], [TAG, BOX, BOX, TAG, BOX]), batch)
    assert {name: float(right.mean()) for name, right in found.items()} == pytest.approx(
        {"": 3 / 5, "tag_": 1 / 2, "box_": 2 / 3}
    )


def test_what_does_not_fit_in_the_text_is_not_scored() -> None:
    batch: Any = SimpleNamespace(msp_labels=[[TAG, BOX, BOX]], msp_in_tag=[[True, False, False]])
    found = _masked_spatial(objectives([TAG, WRONG], [TAG, BOX], max_text_tokens=4), batch)
    assert found["tag_"].tolist() == [1.0] and found["box_"].tolist() == [0.0]


def test_equal_similarities_retrieve_nothing() -> None:
    alone = torch.eye(20, dtype=torch.bool)
    assert set(_retrieval(torch.zeros(20, 20), alone).values()) == {0.0}
    assert set(_retrieval(torch.eye(20), alone).values()) == {1.0}


def test_the_same_caption_of_another_picture_is_not_wrong() -> None:
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    similarity = torch.tensor([[0.5, 0.9, 0.1], [0.9, 0.5, 0.1], [0.6, 0.1, 0.5]])
    found = _retrieval(similarity, same)
    assert found["image_to_text_recall_at_1"] == pytest.approx(2 / 3)  # the third picture's caption comes second
    assert found["text_to_image_recall_at_1"] == pytest.approx(2 / 3)  # the first caption fits the third better
