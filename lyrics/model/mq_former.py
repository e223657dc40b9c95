"""MQ-Former: a BERT whose visual and grounding queries look at the picture (paper section 2).

Shapes: B pictures, P rows (texts beside pictures; P = B unless said), V visual queries, G grounding queries,
Q = V + G, T text tokens, S = Q + T, K keys, L local tokens, H heads, D hidden width, C contrastive width.
"""

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lyrics.errors import InputError
from lyrics.model import mq_former_weights
from lyrics.model.attention import KeyValue, Layer, Memory, Source, Wanted
from lyrics.model.local_tokens import NOTHING, PADDING, LocalFeatures, LocalTokens

Grounding = Literal["pooled", "per_object"]
Objective = Literal["contrastive", "matching", "captioning", "masked_spatial", "instruction"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQFormerConfig:
    """Sizes. Either kind of query may number zero; `cross_attention_every` = 2 puts it in layers 0, 2, 4 …

    Attributes:
        grounding: whether each grounding query looks at all objects (`pooled`, as the paper has it), or query g of G
            at objects g, g + G, g + 2 G … alone (`per_object`), so that it is known what a query tells of.
    """

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
    grounding: Grounding
    vocabulary_size: int
    pad_token_id: int
    image_width: int
    detector_width: int
    segmenter_width: int
    max_objects: int
    temperature: float = 0.07
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        if not self.queries:
            raise InputError(
                "mq_former.visual_queries and mq_former.grounding_queries are both 0, and a picture is seen through "
                "queries; set at least one of them above 0"
            )
        if self.hidden_size % self.heads:
            raise InputError(
                f"mq_former.hidden_size ({self.hidden_size}) must be a multiple of mq_former.heads ({self.heads})"
            )

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


def local_mask(object_BL: Tensor, grounding_queries: int, grounding: Grounding) -> Tensor:
    """Which local tokens each grounding query may look at, mask_BGL (G is 1 where it is the same for all).

    Args:
        object_BL: what `LocalTokens` says of each token: an object's number, NOTHING or PADDING.
    """
    real_B1L = (object_BL != PADDING)[:, None]
    if grounding == "pooled":
        return real_B1L
    query_G1 = torch.arange(grounding_queries, device=object_BL.device)[:, None]
    own_BGL = (object_BL % grounding_queries)[:, None] == query_G1
    return real_B1L & (own_BGL | (object_BL == NOTHING)[:, None])


class TextHead(nn.Module):
    """BERT's language-model head; the decoder is tied to the word embeddings."""

    def __init__(self, hidden_size: int, vocabulary_size: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, text_BTD: Tensor, word_embeddings: nn.Embedding) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(text_BTD))), word_embeddings.weight, self.bias)


@dataclasses.dataclass(frozen=True)
class EncodedQueries:
    """Outputs of the queries without text, and each layer's keys and values, for text that looks back at them."""

    query_PQD: Tensor
    layers: tuple[KeyValue, ...]


class MQFormer(nn.Module):
    """Multi-scale querying transformer with the heads of stage 1."""

    def __init__(self, config: MQFormerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocabulary_size, width)
        self.position_embeddings = nn.Embedding(config.max_text_tokens, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
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
            Layer(
                hidden_size=width,
                heads=config.heads,
                intermediate_size=config.intermediate_size,
                dropout=config.dropout,
                eps=config.layer_norm_eps,
                memory_widths=memory_widths if i % config.cross_attention_every == 0 else {},
            )
            for i in range(config.layers)
        )
        self.activation_checkpointing = False
        self.text_head = TextHead(width, config.vocabulary_size, config.layer_norm_eps)
        self.image_projection = nn.Linear(width, config.projection_size)
        self.text_projection = nn.Linear(width, config.projection_size)
        self.matching_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))  # FSDP2 shards no scalars
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

    @classmethod
    def from_bert(cls, state_dict: dict[str, Tensor], config: MQFormerConfig) -> "MQFormer":
        """Text side and self-attention from a BERT, the rest new; see `mq_former_weights.load_bert`."""
        mq_former = cls(config)
        mq_former_weights.load_bert(mq_former, state_dict)
        return mq_former

    @classmethod
    def from_instructblip(
        cls, state_dict: dict[str, Tensor], config: MQFormerConfig, *, allow_new_text_branch: bool = False
    ) -> "MQFormer":
        """All but what serves grounding alone from a Q-Former; see `mq_former_weights.load_qformer`."""
        mq_former = cls(config)
        mq_former_weights.load_qformer(mq_former, state_dict, allow_new_text_branch=allow_new_text_branch)
        return mq_former

    def look(self, image_tokens_BLD: Tensor, local: LocalFeatures) -> Memory:
        """Project keys and values of a batch of pictures, once for all objectives."""
        sources: dict[str, Source] = {}
        if "visual" in self.counts:
            norm = self.image_norm
            x_BLD = image_tokens_BLD.to(norm.weight.dtype)
            sources["visual"] = Source(F.layer_norm(x_BLD, norm.normalized_shape, eps=norm.eps), affine=norm)
        if "grounding" in self.counts:
            sources["grounding"] = self._local(local)
        return Memory(tuple(layer.remember(sources) for layer in self._layers), len(image_tokens_BLD))

    def look_again(self, memory: Memory, local: LocalFeatures) -> Memory:
        """The same pictures with other local features; what was projected of the image stays."""
        if "grounding" not in self.counts:
            return memory
        sources = {"grounding": self._local(local)}
        layers = (seen | layer.remember(sources) for layer, seen in zip(self._layers, memory.layers, strict=True))
        return Memory(tuple(layers), memory.pictures)

    def _local(self, local: LocalFeatures) -> Source:
        local_BLD, object_BL = self.local_tokens(local)
        mask_BGL = local_mask(object_BL, self.config.grounding_queries, self.config.grounding)
        return Source(local_BLD, mask_BGL[:, None])

    @property
    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def encode_queries(self, memory: Memory, *, cross_query: bool = True) -> EncodedQueries:
        """The queries without text, for every objective in which they see none."""
        x_PSD = self._embed(memory.rows, None)
        visual, grounding = self.config.visual_queries, self.config.grounding_queries
        mask = None
        if not cross_query and visual and grounding:
            none_P0 = torch.ones(memory.rows, 0, dtype=torch.bool, device=x_PSD.device)
            mask = attention_mask(
                "contrastive", visual=visual, grounding=grounding, text_mask_BT=none_P0, cross_query=False
            )
        query_PQD, layers = self._run(x_PSD, mask, memory)
        return EncodedQueries(query_PQD, layers)

    def forward(
        self,
        objective: Objective,
        memory: Memory | None,
        text_ids_PT: Tensor | None = None,
        text_mask_PT: Tensor | None = None,
        *,
        cross_query: bool = True,
        encoded: EncodedQueries | None = None,
        wanted: Wanted = "both",
    ) -> tuple[Tensor, Tensor]:
        """Run the transformer under the attention pattern of one objective.

        Args:
            memory: from `look`; None encodes text alone.
            text_ids_PT: None runs the queries alone.
            text_mask_PT: bool, True where a token is real.
            encoded: these queries are not run again, where the pattern hides the text from them; only text comes back.
            wanted: what of the result is read; the last layer computes no more (`cls` is the text's first position).

        Returns:
            query_PQD and text_PTD (either may have length 0).
        """
        if text_ids_PT is None:
            assert memory is not None
            encoded = self.encode_queries(memory, cross_query=cross_query)
            return encoded.query_PQD, encoded.query_PQD[:, :0]
        counts = self.counts if memory is not None else {}
        queries = sum(counts.values())
        mask_P1SK = attention_mask(
            objective,
            visual=counts.get("visual", 0),
            grounding=counts.get("grounding", 0),
            text_mask_BT=torch.ones_like(text_ids_PT, dtype=torch.bool) if text_mask_PT is None else text_mask_PT,
            cross_query=cross_query,
        )
        if encoded is not None:
            assert not PATTERNS[objective].queries_see_text
            text_PTD, _ = self._run(
                self._embed(0, text_ids_PT), mask_P1SK[:, :, queries:], None, encoded=encoded, wanted=wanted
            )
            return text_PTD[:, :0], text_PTD
        x_PSD, _ = self._run(
            self._embed(0 if memory is None else memory.rows, text_ids_PT), mask_P1SK, memory, wanted=wanted
        )
        kept = queries if wanted in ("both", "queries") else 0
        return x_PSD[:, :kept], x_PSD[:, kept:]

    def _embed(self, rows_with_queries: int, text_ids_PT: Tensor | None) -> Tensor:
        parts = []
        if rows_with_queries:
            both_QD = torch.cat([self.visual_queries, self.grounding_queries])
            parts.append(both_QD.expand(rows_with_queries, -1, -1))
        if text_ids_PT is not None:
            positions_T = torch.arange(text_ids_PT.shape[1], device=text_ids_PT.device)
            parts.append(self.word_embeddings(text_ids_PT) + self.position_embeddings(positions_T))
        x_PSD = self.embedding_norm(torch.cat(parts, dim=1))
        return F.dropout(x_PSD, self.config.dropout, self.training)

    def _run(
        self,
        x_PSD: Tensor,
        mask_P1SK: Tensor | None,
        memory: Memory | None,
        *,
        encoded: EncodedQueries | None = None,
        wanted: Wanted = "both",
    ) -> tuple[Tensor, tuple[KeyValue, ...]]:
        """All layers. Returns what is wanted of x, and each layer's keys and values in self-attention."""
        keys_and_values = []
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            arguments = (
                x_PSD,
                mask_P1SK,
                {} if memory is None else self.counts,
                {} if memory is None else memory.layers[index],
                None if memory is None else memory.lanes,
                None if encoded is None else encoded.layers[index],
                wanted if index == last else "both",
            )
            if self.activation_checkpointing and self.training:
                x_PSD, own = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_PSD, own = layer(*arguments)
            keys_and_values.append(own)
        return x_PSD, tuple(keys_and_values)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile each layer (torch.compile); lengths of texts and numbers of objects stay dynamic."""
        for layer in self._layers:
            layer.compile(dynamic=True, backend=backend)

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
