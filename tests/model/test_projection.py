"""The projection starts where the language model's words are."""

import pytest
import torch

from lyrics.model.projection import Projection


@pytest.mark.parametrize("language_width", [12, 20])
def test_queries_start_as_large_as_words_and_as_different(language_width: int) -> None:
    torch.manual_seed(0)
    shared_QD = 10 * torch.randn(4, 16)
    query_BQD = shared_QD.mean(0) + 0.1 * torch.randn(600, 4, 16) @ torch.diag(torch.logspace(0, -1, 16))
    words_VE = 0.3 + 0.2 * torch.randn(500, language_width)
    projection = Projection(16, language_width)
    projection.start_from(query_BQD, words_VE)
    token_RE = projection(query_BQD).detach().flatten(0, 1)
    torch.testing.assert_close(token_RE.mean(0), words_VE.mean(0), atol=2e-3, rtol=0)
    assert float(token_RE.std(0).square().mean().sqrt()) == pytest.approx(0.2, rel=0.1)
    strengths = torch.linalg.svdvals(token_RE - token_RE.mean(0))[: min(16, language_width)]
    assert strengths[-1] > 0.5 * strengths[0], "every direction in which queries differ is as plain as the others"


def test_directions_without_any_variance_stay_finite() -> None:
    projection = Projection(8, 8)
    projection.start_from(torch.zeros(10, 2, 8), torch.randn(20, 8))
    assert projection.linear.weight.isfinite().all() and projection.linear.bias.isfinite().all()
