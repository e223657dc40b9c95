"""From MQ-Former's width to the language model's (paper section 4): one linear layer, as in BLIP-2.

Shapes: B batch, Q queries, X query outputs, D MQ-Former width, E language width, V vocabulary.
"""

import math

import torch
from torch import Tensor, nn

_EPSILON = 1e-3  # of the mean variance: directions that hardly vary are noise, and stay small
_TINY = 1e-12
_RIDGE = 1e-2  # of the mean variance


class Projection(nn.Module):
    """query_BQD → token_BQE, E the language model's hidden width.

    Args:
        output_std: spread of the first outputs for normalised inputs; that of the language model's word embeddings
            lets query tokens start as large as words.
    """

    def __init__(self, hidden_size: int, language_width: int, output_std: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, language_width)
        nn.init.normal_(self.linear.weight, std=output_std / math.sqrt(hidden_size))
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def start_from(self, query_BQD: Tensor, words_VE: Tensor) -> None:
        """Start so that outputs for `query_BQD` have the mean and the spread of the language model's words.

        Queries differ little from picture to picture beside what they share, and a language model that finds sixteen
        constants learns to pass over them. So what they share becomes the words' mean, and what tells pictures apart
        (the principal directions, each scaled to the same variance) the words' spread.
        """
        width, language_width = self.linear.in_features, self.linear.out_features
        rows_RD, words_VE = _exact(query_BQD.flatten(0, 1)), _exact(words_VE)
        mean_D = rows_RD.mean(0)
        variances_D, directions_DD = torch.linalg.eigh(torch.cov(rows_RD.T))
        kept = min(width, language_width)
        scales_K = (variances_D[-kept:].clamp(min=0) + _EPSILON * variances_D.mean() + _TINY).rsqrt()
        rotation_EK = nn.init.orthogonal_(torch.empty(language_width, kept)).double()
        weight_ED = rotation_EK @ (directions_DD[:, -kept:] * scales_K).T
        weight_ED *= words_VE.std(0).mean() * math.sqrt(language_width / kept)
        self.linear.weight.copy_(weight_ED)
        self.linear.bias.copy_(words_VE.mean(0) - weight_ED @ mean_D)

    @torch.no_grad()
    def start_from_answers(self, query_XD: Tensor, answer_XE: Tensor, words_VE: Tensor) -> None:
        """Start so that an object's token is what is said of it, by a ridge regression; its spread is that of words.

        Args:
            query_XD: outputs of queries, each of an object that was asked about.
            answer_XE: sum of the embeddings of the answer's words, each less the mean of all words.
        """
        x_XD, y_XE, words_VE = map(_exact, (query_XD, answer_XE, words_VE))
        mean_D = x_XD.mean(0)
        x_XD = x_XD - mean_D
        covariance_DD = x_XD.T @ x_XD / len(x_XD)
        ridge = float(covariance_DD.diagonal().mean()) * _RIDGE + _TINY
        covariance_DD.diagonal().add_(ridge)
        weight_DE = torch.linalg.solve(covariance_DD, x_XD.T @ (y_XE - y_XE.mean(0)) / len(x_XD))
        spread = (x_XD @ weight_DE).std(0).mean().clamp(min=_TINY)
        weight_ED = (weight_DE * words_VE.std(0).mean() / spread).T
        self.linear.weight.copy_(weight_ED)
        self.linear.bias.copy_(words_VE.mean(0) - weight_ED @ mean_D)

    def forward(self, query_BQD: Tensor) -> Tensor:
        return self.linear(query_BQD)


def _exact(x: Tensor) -> Tensor:
    """In float64, on the CPU: MPS has none."""
    return x.cpu().double()
