"""Where MQ-Former's attention goes, recorded by hooks while it runs; nothing in its own code knows of them.

Fused attention returns no weights, so they are computed again from what the projections `query` and `key` gave.

Shapes: B batch, H heads, V visual queries, G grounding queries, Q = V + G, T text tokens, S = Q + T, P patches,
N objects, L local tokens = 1 + N for each source, D width.
"""

import collections
import contextlib
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lyrics.model.attention import Memory, heads_of
from lyrics.model.local_tokens import PADDING
from lyrics.model.mq_former import MQFormer, attention_mask

_PROJECTION = re.compile(r"layers\.\d+\.(attention\.(query|key)|cross_attention\.query)")


def attention_weights(query_BHQd: Tensor, key_BHLd: Tensor, mask: Tensor | None = None) -> Tensor:
    """weights_BHQL in float32 from projected queries and keys; exactly 0 where `mask` (broadcast to it) is False."""
    scores_BHQL = query_BHQd.float() @ key_BHLd.float().transpose(-1, -2) / math.sqrt(query_BHQd.shape[-1])
    if mask is not None:
        scores_BHQL = scores_BHQL.masked_fill(~mask, -torch.inf)
    return scores_BHQL.softmax(-1)


class Recording:
    """One pass of MQ-Former: `look` and one call of `forward`.

    Attributes:
        text_ids_BT: what the queries read.
        memory: what they looked at.
    """

    text_ids_BT: Tensor
    memory: Memory

    def __init__(self, mq_former: MQFormer) -> None:
        self._mq_former = mq_former
        self._projected: dict[str, list[Tensor]] = collections.defaultdict(list)
        self._mask_B1SS: Tensor

    @property
    def cross_layers(self) -> list[int]:
        """Numbers of the layers whose queries look at the picture."""
        return [i for i, layer in enumerate(self._mq_former.layers) if layer.cross_attention is not None]

    def self_attention(self, layer: int) -> Tensor:
        """weights_BHSS over `[visual | grounding | text]`."""
        name = f"layers.{layer}.attention"
        query, key = (self._heads(f"{name}.{kind}") for kind in ("query", "key"))
        # The last layer asks for the queries alone, which come first.
        return attention_weights(query, key, self._mask_B1SS[:, :, : query.shape[2]])

    def cross_attention(self, layer: int) -> dict[str, Tensor]:
        """For each kind of query that there is: `visual` weights_BHVP, `grounding` weights_BHGL."""
        counts, seen = self._mq_former.counts, self.memory.layers[layer]
        query_BHQd = self._heads(f"layers.{layer}.cross_attention.query")
        return {
            kind: attention_weights(part_BHQd, seen[kind].key, seen[kind].mask_B1QL)
            for kind, part_BHQd in zip(counts, query_BHQd.split(list(counts.values()), dim=2), strict=True)
        }

    def _heads(self, name: str) -> Tensor:
        return heads_of(torch.cat(self._projected[name], dim=1), self._mq_former.config.heads)

    def _keep_projection(self, name: str) -> Any:
        return lambda _module, _inputs, output: self._projected[name].append(output.detach())

    def _keep_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        given, config = bound.arguments, self._mq_former.config
        self.text_ids_BT, self.memory = given["text_ids_PT"], given["memory"]
        self._mask_B1SS = attention_mask(
            given["objective"],
            visual=config.visual_queries,
            grounding=config.grounding_queries,
            text_mask_BT=given["text_mask_PT"],
            cross_query=given["cross_query"],
        )


@contextlib.contextmanager
def recording(mq_former: MQFormer) -> Iterator[Recording]:
    """Record one pass; the weights can be asked for afterwards.

    Example:
        with recording(model.mq_former) as maps:
            model.query_tokens([question], [seen])
        weights_BHVP = maps.cross_attention(0)["visual"]
    """
    record = Recording(mq_former)
    handles = [mq_former.register_forward_pre_hook(record._keep_text, with_kwargs=True)]
    for name, module in mq_former.named_modules():
        if _PROJECTION.fullmatch(name) and isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(record._keep_projection(name)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def hiding_objects(mq_former: MQFormer, hidden_BN: Tensor) -> Iterator[None]:
    """Mask the local tokens of some objects; all other tokens stay as they were, ranks included."""

    def hide(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        tokens_BLD, object_BL = output
        hidden = hidden_BN.to(object_BL.device)
        sources = (object_BL.shape[1] - 1) // hidden.shape[1]
        nothing_B1 = hidden.new_zeros(len(object_BL), 1)
        return tokens_BLD, object_BL.masked_fill(torch.cat([nothing_B1, *[hidden] * sources], dim=1), PADDING)

    handle = mq_former.local_tokens.register_forward_hook(hide)
    try:
        yield
    finally:
        handle.remove()


def by_object(weights_QL: Tensor, sources: int, objects: int) -> Tensor:
    """weights over `[nothing | objects]`: an object's tokens of all sources summed, padding left out."""
    nothing_Q1, local_QL = weights_QL[..., :1], weights_QL[..., 1:]
    if not sources:
        return torch.cat([nothing_Q1, local_QL.new_zeros(*local_QL.shape[:-1], objects)], dim=-1)
    summed_QN = local_QL.unflatten(-1, (sources, -1)).sum(-2)
    return torch.cat([nothing_Q1, summed_QN[..., :objects]], dim=-1)
