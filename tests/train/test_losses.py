"""The objectives against slow, obvious computations."""

import math

import pytest
import torch
import torch.nn.functional as F

from lyrics.train import losses


def test_similarity_is_the_maximum_over_queries() -> None:
    torch.manual_seed(0)
    query, text = torch.randn(3, 4, 5), torch.randn(3, 5)
    found = losses.query_text_similarity(query, text)
    for i in range(3):
        for j in range(3):
            best = max(float(F.cosine_similarity(query[i, q], text[j], dim=0)) for q in range(4))
            assert float(found[i, j]) == pytest.approx(best, abs=1e-6)


def test_contrastive_loss_without_repeats_is_smoothed_cross_entropy_both_ways() -> None:
    torch.manual_seed(0)
    similarity = torch.randn(4, 4)
    found = (
        losses.contrastive_loss(similarity, similarity.T, torch.tensor(0.5), torch.eye(4, dtype=torch.bool), 0.1) / 4
    )
    labels = torch.arange(4)
    rows = F.cross_entropy(similarity / 0.5, labels, label_smoothing=0.1)
    columns = F.cross_entropy(similarity.T / 0.5, labels, label_smoothing=0.1)
    torch.testing.assert_close(found, (rows + columns) / 2)


def test_pairs_that_share_a_picture_are_not_negatives() -> None:
    similarity = torch.tensor([[1.0, 9.0, 0.0], [9.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    same = torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    found = losses.contrastive_loss(similarity, similarity.T, torch.tensor(1.0), same, 0.0) / 3
    alone = -math.log(math.e / (math.e + 1))
    last = -math.log(math.e / (math.e + 2))
    assert float(found) == pytest.approx((2 * alone + last) / 3, abs=1e-6)


def test_floor_is_reached_by_the_best_logits() -> None:
    batch, smoothing = 6, 0.1
    low = smoothing / batch
    target = torch.full((batch, batch), low) + torch.eye(batch) * (1 - smoothing)
    logits, same = target.log(), torch.eye(batch, dtype=torch.bool)
    best = losses.contrastive_loss(logits, logits.T, torch.tensor(1.0), same, smoothing) / batch
    assert float(best) == pytest.approx(losses.contrastive_floor(batch, smoothing), abs=1e-5)


def test_hard_negatives_follow_similarity_and_never_share() -> None:
    similarity = torch.tensor([[0.0, 2.0, 0.0, 1.0]]).expand(4, 4)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 3] = True
    drawn = torch.stack(
        [
            losses.hard_negatives(similarity, torch.tensor(1.0), same, torch.full((4,), u))
            for u in torch.linspace(0, 0.999, 400)
        ]
    )
    for row in range(4):
        assert not same[row][drawn[:, row]].any()
    share = (drawn[:, 0] == 1).double().mean()
    assert float(share) == pytest.approx(math.e**2 / (math.e**2 + 1), abs=0.01)


def test_a_row_without_negatives_draws_none() -> None:
    drawn = losses.hard_negatives(
        torch.zeros(2, 2), torch.tensor(1.0), torch.ones(2, 2, dtype=torch.bool), torch.rand(2)
    )
    assert drawn.tolist() == [-1, -1]


def test_chance_of_matching_is_the_entropy_of_one_to_two() -> None:
    prior = torch.tensor([math.log(2 / 3), math.log(1 / 3)]).expand(3, 2)
    found = losses.matching_loss(prior, torch.tensor([1, 0, 0])) / 3
    assert float(found) == pytest.approx(losses.MATCHING_CHANCE, abs=1e-6) == pytest.approx(0.6365, abs=1e-4)
