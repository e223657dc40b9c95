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


def test_tokens_start_as_what_is_said_of_their_object() -> None:
    """Each object's output hides one of five words under noise that is larger."""
    torch.manual_seed(0)
    words_VE, hidden_5D = 0.3 + 0.2 * torch.randn(50, 12), torch.randn(5, 16)
    word_X = torch.randint(5, (1200,))
    query_XD = 4 + 0.3 * hidden_5D[word_X] + 0.5 * torch.randn(1200, 16) @ torch.diag(torch.logspace(0, -2, 16))
    projection = Projection(16, 12)
    projection.start_from_answers(query_XD[:1000], words_VE[word_X[:1000]] - words_VE.mean(0), words_VE)
    token_XE = projection(query_XD).detach()
    own_5E = words_VE[:5] - words_VE[:5].mean(0)
    nearest_X = ((token_XE - token_XE.mean(0)) @ own_5E.T - own_5E.square().sum(1) / 2).argmax(1)
    assert float((nearest_X == word_X)[1000:].float().mean()) > 0.85
    torch.testing.assert_close(token_XE[:1000].mean(0), words_VE.mean(0), atol=2e-3, rtol=0)
    assert float(token_XE[:1000].std(0).mean()) == pytest.approx(float(words_VE.std(0).mean()), rel=1e-3)


def test_outputs_that_never_differ_stay_finite() -> None:
    projection = Projection(8, 8)
    projection.start_from_answers(torch.zeros(6, 8), torch.zeros(6, 8), torch.randn(20, 8))
    assert projection.linear.weight.isfinite().all() and projection.linear.bias.isfinite().all()
