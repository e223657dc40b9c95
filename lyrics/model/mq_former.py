"""MQ-Former: a BERT whose visual and grounding queries look at the picture (paper section 2).

Shapes: B batch, V visual queries, G grounding queries, Q = V + G, T text tokens, S = Q + T, P patches,
L local tokens, H heads, D hidden width, C contrastive width.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyrics.model.local_tokens import LocalFeatures, LocalTokens

Objective = Literal["contrastive", "matching", "captioning", "masked_spatial", "instruction"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQFormerConfig:
    """Sizes. Either kind of query may number zero; `cross_attention_every` = 2 puts it in layers 0, 2, 4 …"""

    visual_queries: int
    grounding_queries: int
    hidden_size: int
    layers: int
    heads: int
    intermediate_size: int
    cross_attention_every: int
    max_text_tokens: int
    dropout: float
    projection_size: int
    detector_tokens: bool
    segmenter_tokens: bool
    vocabulary_size: int
    pad_token_id: int
    image_width: int
    detector_width: int
    segmenter_width: int
    max_objects: int
    temperature: float = 0.07

    @property
    def queries(self) -> int:
        return self.visual_queries + self.grounding_queries

    @property
    def source_widths(self) -> dict[str, int]:
        """Widths of the local sources that are switched on."""
        widths = {"detector": self.detector_width, "segmenter": self.segmenter_width}
        on = {"detector": self.detector_tokens, "segmenter": self.segmenter_tokens}
        return {name: width for name, width in widths.items() if on[name]}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Who may look at whom. Queries always see queries of their own kind, text always sees text."""

    queries_see_text: bool
    text_sees_queries: bool
    causal_text: bool


PATTERNS: dict[str, Pattern] = {
    "contrastive": Pattern(queries_see_text=False, text_sees_queries=False, causal_text=False),
    "matching": Pattern(queries_see_text=True, text_sees_queries=True, causal_text=False),
    "captioning": Pattern(queries_see_text=False, text_sees_queries=True, causal_text=True),
    "masked_spatial": Pattern(queries_see_text=True, text_sees_queries=True, causal_text=False),
    "instruction": Pattern(queries_see_text=True, text_sees_queries=True, causal_text=False),
}


def attention_mask(
    objective: Objective, *, visual: int, grounding: int, text_mask_BT: Tensor, cross_query: bool = True
) -> Tensor:
    """Boolean mask_B1SS (True: row may look at column) over `[visual | grounding | text]` for one objective.

    Args:
        text_mask_BT: True where a text token is real. Padding is seen by nobody but itself.
        cross_query: whether visual and grounding queries see each other.
    """
    pattern = PATTERNS[objective]
    batch, text = text_mask_BT.shape
    queries, total = visual + grounding, visual + grounding + text
    mask_SS = torch.zeros(total, total, dtype=torch.bool, device=text_mask_BT.device)
    mask_SS[:queries, :queries] = cross_query
    mask_SS[:visual, :visual] = True
    mask_SS[visual:queries, visual:queries] = True
    mask_SS[:queries, queries:] = pattern.queries_see_text
    mask_SS[queries:, :queries] = pattern.text_sees_queries
    text_SS = torch.ones(text, text, dtype=torch.bool, device=text_mask_BT.device)
    mask_SS[queries:, queries:] = text_SS.tril() if pattern.causal_text else text_SS
    real_BS = torch.cat([text_mask_BT.new_ones(batch, queries), text_mask_BT], dim=1)
    itself_SS = torch.eye(total, dtype=torch.bool, device=text_mask_BT.device)
    return ((mask_SS & real_BS[:, None, :]) | itself_SS).unsqueeze(1)


def _heads(x_BSD: Tensor, heads: int) -> Tensor:
    return x_BSD.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, x_BSD: Tensor, mask_B1SS: Tensor) -> Tensor:
        q, k, v = (_heads(project(x_BSD), self.heads) for project in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        y_BHSd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SS, dropout_p=dropout)
        y_BSD = self.out(y_BHSd.transpose(1, 2).flatten(2))
        return self.norm(x_BSD + F.dropout(y_BSD, self.dropout, self.training))


class CrossAttention(nn.Module):
    """Queries look at one source each; query and output projections are shared, keys and values are not."""

    def __init__(self, hidden_size: int, heads: int, dropout: float, memory_widths: dict[str, int]) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.ModuleDict({name: nn.Linear(width, hidden_size) for name, width in memory_widths.items()})
        self.value = nn.ModuleDict({name: nn.Linear(width, hidden_size) for name, width in memory_widths.items()})
        self.out = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)

    def remember(self, tokens: dict[str, tuple[Tensor, Tensor | None]]) -> dict[str, "KeyValue"]:
        """Keys and values of each source's tokens_BLD, with their mask_B11L."""
        return {
            name: KeyValue(_heads(self.key[name](x), self.heads), _heads(self.value[name](x), self.heads), mask)
            for name, (x, mask) in tokens.items()
        }

    def forward(self, queries: dict[str, Tensor], memory: dict[str, "KeyValue"]) -> Tensor:
        attended = []
        for source, x_BQD in queries.items():
            seen = memory[source]
            y_BHQd = F.scaled_dot_product_attention(
                _heads(self.query(x_BQD), self.heads),
                seen.key,
                seen.value,
                attn_mask=seen.mask_B11L,
                dropout_p=self.dropout if self.training else 0.0,
            )
            attended.append(y_BHQd.transpose(1, 2).flatten(2))
        y_BQD = self.out(torch.cat(attended, dim=1))
        return self.norm(torch.cat(list(queries.values()), dim=1) + F.dropout(y_BQD, self.dropout, self.training))


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.inner = nn.Linear(hidden_size, intermediate_size)
        self.outer = nn.Linear(intermediate_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y_BSD = self.outer(F.gelu(self.inner(x_BSD)))
        return self.norm(x_BSD + F.dropout(y_BSD, self.dropout, self.training))


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """Keys and values of one source for one layer, (B, H, L, D/H), and which of the L are real."""

    key: Tensor
    value: Tensor
    mask_B11L: Tensor | None

    def index(self, rows_B: Tensor) -> "KeyValue":
        return KeyValue(
            self.key[rows_B], self.value[rows_B], None if self.mask_B11L is None else self.mask_B11L[rows_B]
        )


@dataclasses.dataclass(frozen=True)
class Memory:
    """What the queries look at: keys and values of a batch of pictures, projected once, shared by all objectives."""

    layers: tuple[dict[str, KeyValue], ...]

    def index(self, rows_B: Tensor) -> "Memory":
        return Memory(tuple({source: kv.index(rows_B) for source, kv in layer.items()} for layer in self.layers))


class Layer(nn.Module):
    def __init__(self, config: MQFormerConfig, memory_widths: dict[str, int]) -> None:
        super().__init__()
        self.attention = SelfAttention(config.hidden_size, config.heads, config.dropout)
        self.cross_attention = (
            CrossAttention(config.hidden_size, config.heads, config.dropout, memory_widths) if memory_widths else None
        )
        self.text_feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.dropout)
        self.query_feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.dropout)

    def forward(
        self, x_BSD: Tensor, mask_B1SS: Tensor, counts: dict[str, int], memory: dict[str, KeyValue] | None
    ) -> Tensor:
        x_BSD = self.attention(x_BSD, mask_B1SS)
        queries = sum(counts.values())
        if not queries:
            return self.text_feed_forward(x_BSD)
        query_BQD, text_BTD = x_BSD[:, :queries], x_BSD[:, queries:]
        if self.cross_attention is not None and memory is not None:
            parts = dict(zip(counts, query_BQD.split(list(counts.values()), dim=1), strict=True))
            query_BQD = self.cross_attention(parts, memory)
        query_BQD = self.query_feed_forward(query_BQD)
        return torch.cat([query_BQD, self.text_feed_forward(text_BTD)], dim=1) if text_BTD.shape[1] else query_BQD


class TextHead(nn.Module):
    """BERT's language-model head; the decoder is tied to the word embeddings."""

    def __init__(self, hidden_size: int, vocabulary_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, text_BTD: Tensor, word_embeddings: nn.Embedding) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(text_BTD))), word_embeddings.weight, self.bias)


class MQFormer(nn.Module):
    """Multi-scale querying transformer with the heads of stage 1."""

    def __init__(self, config: MQFormerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocabulary_size, width)
        self.position_embeddings = nn.Embedding(config.max_text_tokens, width)
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.visual_queries = nn.Parameter(torch.zeros(config.visual_queries, width))
        self.grounding_queries = nn.Parameter(torch.zeros(config.grounding_queries, width))
        self.image_norm = nn.LayerNorm(config.image_width)
        self.local_tokens = LocalTokens(
            hidden_size=width,
            source_widths=config.source_widths,
            max_objects=config.max_objects,
            word_embeddings=self.word_embeddings,
            pad_token_id=config.pad_token_id,
        )
        self.counts = {
            name: count
            for name, count in (("visual", config.visual_queries), ("grounding", config.grounding_queries))
            if count
        }
        widths = {"visual": config.image_width, "grounding": width}
        memory_widths = {name: widths[name] for name in self.counts}
        self.layers = nn.ModuleList(
            Layer(config, memory_widths if i % config.cross_attention_every == 0 else {}) for i in range(config.layers)
        )
        self.text_head = TextHead(width, config.vocabulary_size)
        self.image_projection = nn.Linear(width, config.projection_size)
        self.text_projection = nn.Linear(width, config.projection_size)
        self.matching_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        for module in (
            self.word_embeddings,
            self.position_embeddings,
            *self.layers,
            self.text_head,
            self.matching_head,
        ):
            module.apply(_initialise)
        for parameter in (self.visual_queries, self.grounding_queries):
            nn.init.normal_(parameter, std=0.02)

    def look(self, image_tokens_BPD: Tensor, local: LocalFeatures) -> Memory:
        """Project keys and values of a batch of pictures, once for all objectives."""
        tokens: dict[str, tuple[Tensor, Tensor | None]] = {}
        if "visual" in self.counts:
            normalised = self.image_norm(image_tokens_BPD.to(self.image_norm.weight.dtype))
            tokens["visual"] = (normalised, None)
        if "grounding" in self.counts:
            local_BLD, mask_BL = self.local_tokens(local)
            tokens["grounding"] = (local_BLD, mask_BL[:, None, None, :])
        layers: list[dict[str, KeyValue]] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            layers.append({} if layer.cross_attention is None else layer.cross_attention.remember(tokens))
        return Memory(tuple(layers))

    def forward(
        self,
        objective: Objective,
        memory: Memory | None,
        text_ids_BT: Tensor | None = None,
        text_mask_BT: Tensor | None = None,
        *,
        cross_query: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Run the transformer under the attention pattern of one objective.

        Args:
            memory: from `look`; None encodes text alone.
            text_ids_BT: None runs the queries alone.
            text_mask_BT: bool, True where a token is real.

        Returns:
            query_BQD and text_BTD (either may have length 0).
        """
        counts = self.counts if memory is not None else {}
        queries = sum(counts.values())
        parts = []
        if memory is not None:
            first = next(iter(next(layer for layer in memory.layers if layer).values()))
            both_QD = torch.cat([self.visual_queries, self.grounding_queries])
            parts.append(both_QD.expand(first.key.shape[0], -1, -1))
        if text_ids_BT is not None:
            positions_T = torch.arange(text_ids_BT.shape[1], device=text_ids_BT.device)
            parts.append(self.word_embeddings(text_ids_BT) + self.position_embeddings(positions_T))
        x_BSD = self.embedding_norm(torch.cat(parts, dim=1))
        x_BSD = F.dropout(x_BSD, self.config.dropout, self.training)
        if text_mask_BT is None:
            text_mask_BT = x_BSD.new_ones(x_BSD.shape[0], x_BSD.shape[1] - queries, dtype=torch.bool)
        mask_B1SS = attention_mask(
            objective,
            visual=counts.get("visual", 0),
            grounding=counts.get("grounding", 0),
            text_mask_BT=text_mask_BT,
            cross_query=cross_query,
        )
        for index, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, mask_B1SS, counts, memory.layers[index] if memory is not None else None)
        return x_BSD[:, :queries], x_BSD[:, queries:]

    def split_queries(self, query_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """Visual and grounding outputs; where one kind numbers zero, the other stands in (the paper's ablation)."""
        visual, grounding = query_BQD.split([self.config.visual_queries, self.config.grounding_queries], dim=1)
        return (visual if visual.shape[1] else grounding), (grounding if grounding.shape[1] else visual)

    def text_logits(self, text_BTD: Tensor) -> Tensor:
        return self.text_head(text_BTD, self.word_embeddings)


def _initialise(module: nn.Module) -> None:
    """BERT's 0.02 for embeddings; Xavier for linear layers, about BERT's at width 768 and larger where narrower."""
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
