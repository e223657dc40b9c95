"""From MQ-Former's width to the language model's (paper section 4): one linear layer, as in BLIP-2."""

import math

from torch import Tensor, nn


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

    def forward(self, query_BQD: Tensor) -> Tensor:
        return self.linear(query_BQD)
