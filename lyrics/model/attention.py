"""The layers that MQ-Former is made of (paper section 2).

Shapes: B pictures, P rows (a row is one text, or none, beside one picture; P = B unless said), Q queries, T text
tokens, S sequence, K keys (S, or more where earlier keys are given), L tokens of a source, H heads, D hidden width,
d = D / H.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Wanted = Literal["both", "queries", "text", "cls"]


def heads_of(x_BSD: Tensor, heads: int) -> Tensor:
    """x_BHSd."""
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


@dataclasses.dataclass(frozen=True)
class Source:
    """What queries look at, before it is projected.

    Attributes:
        mask_B1QL: which of the L tokens each query may look at (None: all of them; Q is 1 where all see the same).
        affine: a norm whose scale and shift still have to be applied to x. Taken into the projections they leave x
            without a gradient, which frozen features do not need and which would cost as much as projecting them.
    """

    x_BLD: Tensor
    mask_B1QL: Tensor | None = None
    affine: nn.LayerNorm | None = None

    def project(self, linear: nn.Linear) -> Tensor:
        if self.affine is None:
            return linear(self.x_BLD)
        weight, bias = linear.weight * self.affine.weight, linear.bias + linear.weight @ self.affine.bias
        return F.linear(self.x_BLD, weight, bias)


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values for one layer, (B, H, L, d), and which of the L are looked at (see `Source`)."""

    key: Tensor
    value: Tensor
    mask_B1QL: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Which picture each of P rows looks at.

    Rows of one picture stand side by side as lanes of its queries, so that no key or value is copied: queries do not
    see each other in cross-attention.
    """

    slot_P: Tensor
    lanes: int

    @classmethod
    def of(cls, picture_P: Tensor) -> "Lanes":
        """`picture_P`: index of the picture of each row."""
        sorted_P, order_P = picture_P.sort(stable=True)
        lane_P = torch.empty_like(picture_P)
        lane_P[order_P] = torch.arange(len(picture_P), device=picture_P.device) - torch.searchsorted(sorted_P, sorted_P)
        lanes = int(lane_P.max()) + 1
        return cls(picture_P * lanes + lane_P, lanes)

    def spread(self, x_PQD: Tensor, pictures: int) -> Tensor:
        """(B, lanes · Q, D); lanes without a row hold zeros."""
        spread = x_PQD.new_zeros(pictures * self.lanes, *x_PQD.shape[1:]).index_copy(0, self.slot_P, x_PQD)
        return spread.unflatten(0, (pictures, self.lanes)).flatten(1, 2)

    def repeat(self, mask_B1QL: Tensor | None) -> Tensor | None:
        """The mask of the queries of one row for those of all lanes; one that is the same for all queries stays."""
        if mask_B1QL is None or mask_B1QL.shape[2] == 1:
            return mask_B1QL
        return mask_B1QL.repeat(1, 1, self.lanes, 1)

    def collect(self, x_BXD: Tensor) -> Tensor:
        """x_PQD, the inverse of `spread`."""
        return x_BXD.unflatten(1, (self.lanes, -1)).flatten(0, 1)[self.slot_P]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the queries look at: keys and values of B pictures, projected once, shared by all objectives.

    Attributes:
        layers: by source, empty where a layer has no cross-attention.
        pictures: B.
        lanes: which picture each row looks at; None where row i looks at picture i.
    """

    layers: tuple[dict[str, KeyValue], ...]
    pictures: int
    lanes: Lanes | None = None

    def index(self, picture_P: Tensor) -> "Memory":
        """The memory of P rows that look at `picture_P` of these pictures."""
        assert self.lanes is None
        return Memory(self.layers, self.pictures, Lanes.of(picture_P))

    @property
    def rows(self) -> int:
        return self.pictures if self.lanes is None else len(self.lanes.slot_P)


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(
        self, x_BSD: Tensor, mask_B1SK: Tensor | None, earlier: KeyValue | None = None, rows: slice | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Attend from the positions `rows` (all where None) to all positions, those of `earlier` first.

        Returns:
            x of those rows, and keys and values of x.
        """
        own = KeyValue(heads_of(self.key(x_BSD), self.heads), heads_of(self.value(x_BSD), self.heads))
        key, value = own.key, own.value
        if earlier is not None:
            key, value = torch.cat([earlier.key, key], dim=2), torch.cat([earlier.value, value], dim=2)
        if rows is not None:
            x_BSD = x_BSD[:, rows]
            mask_B1SK = None if mask_B1SK is None else mask_B1SK[:, :, rows]
        y_BHSd = F.scaled_dot_product_attention(
            heads_of(self.query(x_BSD), self.heads),
            key,
            value,
            attn_mask=mask_B1SK,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y_BSD = self.out(y_BHSd.transpose(1, 2).flatten(2))
        return self.norm(x_BSD + F.dropout(y_BSD, self.dropout, self.training)), own


class CrossAttention(nn.Module):
    """Queries look at one source each; query and output projections are shared, keys and values are not."""

    def __init__(self, hidden_size: int, heads: int, dropout: float, eps: float, memory_widths: dict[str, int]) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.ModuleDict({name: nn.Linear(width, hidden_size) for name, width in memory_widths.items()})
        self.value = nn.ModuleDict({name: nn.Linear(width, hidden_size) for name, width in memory_widths.items()})
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def remember(self, sources: dict[str, Source]) -> dict[str, KeyValue]:
        """Keys and values of each source."""
        return {
            name: KeyValue(
                heads_of(source.project(self._linear(self.key, name)), self.heads),
                heads_of(source.project(self._linear(self.value, name)), self.heads),
                source.mask_B1QL,
            )
            for name, source in sources.items()
        }

    @staticmethod
    def _linear(modules: nn.ModuleDict, name: str) -> nn.Linear:
        module = modules[name]
        assert isinstance(module, nn.Linear)
        return module

    def forward(self, queries: dict[str, Tensor], memory: dict[str, KeyValue], lanes: Lanes | None = None) -> Tensor:
        """`queries`: x_PQD by source. Returns all of them, in that order."""
        attended = []
        for source, x_PQD in queries.items():
            seen = memory[source]
            q_PQD = self.query(x_PQD)
            y_BHQd = F.scaled_dot_product_attention(
                heads_of(q_PQD if lanes is None else lanes.spread(q_PQD, len(seen.key)), self.heads),
                seen.key,
                seen.value,
                attn_mask=seen.mask_B1QL if lanes is None else lanes.repeat(seen.mask_B1QL),
                dropout_p=self.dropout if self.training else 0.0,
            )
            y_BQD = y_BHQd.transpose(1, 2).flatten(2)
            attended.append(y_BQD if lanes is None else lanes.collect(y_BQD))
        y_PQD = self.out(torch.cat(attended, dim=1))
        return self.norm(torch.cat(list(queries.values()), dim=1) + F.dropout(y_PQD, self.dropout, self.training))


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.inner = nn.Linear(hidden_size, intermediate_size)
        self.outer = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.outer(F.gelu(self.inner(x_BSD)))
        return self.norm(x_BSD + F.dropout(y_BSD, self.dropout, self.training))


class Layer(nn.Module):
    """Self-attention of all; cross-attention of the queries, where `memory_widths` names sources; two feed-forwards."""

    def __init__(
        self,
        *,
        hidden_size: int,
        heads: int,
        intermediate_size: int,
        dropout: float,
        eps: float,
        memory_widths: dict[str, int],
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(hidden_size, heads, dropout, eps)
        self.cross_attention = (
            CrossAttention(hidden_size, heads, dropout, eps, memory_widths) if memory_widths else None
        )
        self.text_feed_forward = FeedForward(hidden_size, intermediate_size, dropout, eps)
        self.query_feed_forward = FeedForward(hidden_size, intermediate_size, dropout, eps)

    def remember(self, sources: dict[str, Source]) -> dict[str, KeyValue]:
        """What its queries will look at; nothing in a layer without cross-attention."""
        return {} if self.cross_attention is None else self.cross_attention.remember(sources)

    def forward(
        self,
        x_PSD: Tensor,
        mask_P1SK: Tensor | None,
        counts: dict[str, int],
        memory: dict[str, KeyValue],
        lanes: Lanes | None = None,
        earlier: KeyValue | None = None,
        wanted: Wanted = "both",
    ) -> tuple[Tensor, KeyValue]:
        """`[queries | text]` one layer on; `counts` says how many queries of each source come first.

        Args:
            earlier: keys and values of positions before x.
            wanted: what the caller reads of the result; the rest is not computed (for the last layer).

        Returns:
            what is wanted of x, and the keys and values of the whole x in self-attention.
        """
        queries = sum(counts.values())
        rows = {
            "both": None,
            "queries": slice(queries),
            "text": slice(queries, None),
            "cls": slice(queries, queries + 1),
        }
        x_PSD, own = self.attention(x_PSD, mask_P1SK, earlier, rows[wanted])
        if wanted in ("text", "cls") or not queries:
            return self.text_feed_forward(x_PSD), own
        query_PQD, text_PTD = x_PSD[:, :queries], x_PSD[:, queries:]
        if self.cross_attention is not None:
            parts = dict(zip(counts, query_PQD.split(list(counts.values()), dim=1), strict=True))
            query_PQD = self.cross_attention(parts, memory, lanes)
        query_PQD = self.query_feed_forward(query_PQD)
        if not text_PTD.shape[1]:
            return query_PQD, own
        return torch.cat([query_PQD, self.text_feed_forward(text_PTD)], dim=1), own
