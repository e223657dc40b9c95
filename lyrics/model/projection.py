"""From MQ-Former's width to the language model's (paper section 4): one linear layer, as in BLIP-2.

Shapes: B batch, Q queries, P pictures, X query outputs, D MQ-Former width, E language width, V vocabulary.
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
        rows_RD = query_BQD.flatten(0, 1).double()
        mean_D = rows_RD.mean(0)
        variances_D, directions_DD = torch.linalg.eigh(torch.cov(rows_RD.T))
        kept = min(width, language_width)
        scales_K = (variances_D[-kept:].clamp(min=0) + _EPSILON * variances_D.mean() + _TINY).rsqrt()
        rotation_EK = nn.init.orthogonal_(torch.empty(language_width, kept)).double().to(rows_RD.device)
        weight_ED = rotation_EK @ (directions_DD[:, -kept:] * scales_K).T
        weight_ED *= words_VE.double().std(0).mean() * math.sqrt(language_width / kept)
        self.linear.weight.copy_(weight_ED)
        self.linear.bias.copy_(words_VE.double().mean(0) - weight_ED @ mean_D)

    @torch.no_grad()
    def start_from_captions(self, query_XD: Tensor, picture_X: Tensor, said_PE: Tensor, words_VE: Tensor) -> None:
        """Start so that the tokens of a picture add up to what its captions say.

        A ridge regression from the sum of a picture's outputs to the sum of its captions' words: as the sums are
        linear, each output comes near the words of its own object. Its spread is then that of words.

        Args:
            query_XD: outputs of queries that have an object.
            picture_X: number of the picture that each belongs to.
            said_PE: sum of the embeddings of a caption's words, each less the mean of all words.
        """
        x_XD, words_VE = query_XD.double(), words_VE.double()
        zero_P = x_XD.new_zeros(len(said_PE))
        count_P1 = zero_P.index_add(0, picture_X, x_XD.new_ones(len(x_XD)))[:, None]  # takes what all objects share
        sums_PD = x_XD.new_zeros(len(said_PE), x_XD.shape[1]).index_add(0, picture_X, x_XD)
        inputs_PF = torch.cat([sums_PD, count_P1], dim=1)
        inputs_PF = inputs_PF - inputs_PF.mean(0)
        outputs_PE = said_PE.double() - said_PE.double().mean(0)
        covariance_FF = inputs_PF.T @ inputs_PF / len(inputs_PF)
        ridge_F = torch.full_like(covariance_FF[0], float(covariance_FF.diagonal()[:-1].mean()) * _RIDGE + _TINY)
        weight_FE = torch.linalg.solve(covariance_FF + ridge_F.diag(), inputs_PF.T @ outputs_PE / len(inputs_PF))
        weight_ED = weight_FE[:-1].T
        mean_D = x_XD.mean(0)
        spread = ((x_XD - mean_D) @ weight_ED.T).std(0).mean().clamp(min=_TINY)
        weight_ED = weight_ED * words_VE.std(0).mean() / spread
        self.linear.weight.copy_(weight_ED)
        self.linear.bias.copy_(words_VE.mean(0) - weight_ED @ mean_D)

    def forward(self, query_BQD: Tensor) -> Tensor:
        return self.linear(query_BQD)
