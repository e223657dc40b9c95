"""From MQ-Former's width to the language model's (paper section 4): one linear layer, as in BLIP-2."""

from torch import Tensor, nn


class Projection(nn.Module):
    """query_BQD → token_BQE, E the language model's hidden width."""

    def __init__(self, hidden_size: int, language_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, language_width)

    def forward(self, query_BQD: Tensor) -> Tensor:
        return self.linear(query_BQD)
