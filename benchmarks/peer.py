"""Stage 1 of BLIP-2 (arXiv 2301.12597), as its authors' code computes it, written on transformers' Q-Former.

ITC, ITM and ICG: no grounding queries, no masked spatial prediction. Each objective looks at the picture anew; the
negatives of ITM are image features, gathered and projected again.

Shapes: B pairs, M pairs of ITM (3 B), P patches, W image width, Q queries, T text tokens, S = Q + T, D hidden width.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, InstructBlipQFormerConfig, InstructBlipQFormerModel
from transformers.models.bert.modeling_bert import BertLMPredictionHead

from lyrics.model.inputs import TextTokenizer
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.train import losses

Captioning = Literal["kept", "again"]
PUBLISHED_TEXT_TOKENS = 32


class Peer(nn.Module):
    """Q-Former with the heads of stage 1.

    transformers' Q-Former has no past key values. `captioning="kept"` does what the authors' code does with them:
    captions look at the keys and values that the queries had in ITC. `"again"` uses the public forward alone: queries
    and captions in one pass under a causal mask.
    """

    def __init__(self, config: MQFormerConfig, tokenizer: TextTokenizer, smoothing: float) -> None:
        super().__init__()
        self.tokenizer, self.smoothing = tokenizer, smoothing
        sizes: dict[str, Any] = {
            "vocab_size": config.vocabulary_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": config.intermediate_size,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
            "max_position_embeddings": config.max_text_tokens,
            "pad_token_id": config.pad_token_id,
        }
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                **sizes,
                cross_attention_frequency=config.cross_attention_every,
                encoder_hidden_size=config.image_width,
            )
        )
        self.qformer.set_attn_implementation("sdpa")
        self.image_norm = nn.LayerNorm(config.image_width)
        self.query_tokens = nn.Parameter(torch.zeros(config.visual_queries, config.hidden_size))
        self.language_head = BertLMPredictionHead(BertConfig(**sizes))
        self.language_head.decoder.weight = self.qformer.embeddings.word_embeddings.weight
        self.language_head.decoder.bias = self.language_head.bias
        self.image_projection = nn.Linear(config.hidden_size, config.projection_size)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_size)
        self.matching_head = nn.Linear(config.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))

    def forward(
        self,
        image_BPW: Tensor,
        caption_rows: Sequence[Sequence[int]],
        uniform_B2: Tensor,
        *,
        text_tokens: int | None,
        captioning: Captioning,
    ) -> dict[str, Tensor]:
        """The three losses of B different pictures and captions.

        Args:
            caption_rows: token ids without special tokens.
            uniform_B2: draws in [0, 1) that choose the negatives.
            text_tokens: every text is padded to so many tokens; None pads to the longest in the batch.
        """
        image_BPW = self.image_norm(image_BPW)
        t = self.tokenizer
        texts_BT, mask_BT = self._pad([[t.cls, *row, t.sep] for row in caption_rows], text_tokens)
        # The [SEP] that ends an empty spatial text: then the tokens are those of LYRICS' matching.
        pairs_BT, pairs_mask_BT = self._pad([[t.cls, *row, t.sep, t.sep] for row in caption_rows], text_tokens)
        captions_BT, captions_mask_BT = self._pad([[t.dec, *row, t.sep] for row in caption_rows], text_tokens)

        query_BQD, kept = self.encode_queries(image_BPW)
        similarity_BB = self.similarity(query_BQD, self.encode_text(texts_BT, mask_BT))
        predict = self.caption if captioning == "again" else self.caption_from_kept
        text_BTD = predict(image_BPW, kept, captions_BT)
        labels_BT = captions_BT.masked_fill(~captions_mask_BT, losses.IGNORED)
        logits_BTV = self.language_head(text_BTD)[:, :-1]
        return {
            "itc_loss": self.contrast(similarity_BB),
            "itm_loss": self.match(image_BPW, pairs_BT, pairs_mask_BT, similarity_BB.detach(), uniform_B2),
            "icg_loss": F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT[:, 1:].flatten()),
        }

    def encode_queries(self, image_BPW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Queries that saw the picture, and their keys and values in self-attention: key, value of layer 0, 1 …"""
        kept: list[Tensor] = []
        projections = [
            project
            for layer in self._layers
            for project in (layer.attention.attention.key, layer.attention.attention.value)
        ]
        hooks = [p.register_forward_hook(lambda _module, _inputs, output: kept.append(output)) for p in projections]
        query_BQD = self.qformer(
            None, query_embeds=self._queries(len(image_BPW)), encoder_hidden_states=image_BPW
        ).last_hidden_state
        for hook in hooks:
            hook.remove()
        return query_BQD, kept

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.qformer(ids_BT, attention_mask=mask_BT).last_hidden_state[:, 0]

    def similarity(self, query_BQD: Tensor, text_BD: Tensor) -> Tensor:
        """Of picture i and text j: the best query's cosine."""
        query_BQC = F.normalize(self.image_projection(query_BQD), dim=-1)
        text_BC = F.normalize(self.text_projection(text_BD), dim=-1)
        return torch.einsum("iqc,jc->ijq", query_BQC, text_BC).amax(-1)

    def contrast(self, similarity_BB: Tensor) -> Tensor:
        logits_BB = similarity_BB.float() / self.temperature
        target_B = torch.arange(len(logits_BB), device=logits_BB.device)
        return (
            F.cross_entropy(logits_BB, target_B, label_smoothing=self.smoothing)
            + F.cross_entropy(logits_BB.T, target_B, label_smoothing=self.smoothing)
        ) / 2

    def match(
        self, image_BPW: Tensor, ids_BT: Tensor, mask_BT: Tensor, similarity_BB: Tensor, uniform_B2: Tensor
    ) -> Tensor:
        """Pairs, then pictures with a hard negative text, then texts with a hard negative picture."""
        same_BB = torch.eye(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        text_of_image = losses.hard_negatives(similarity_BB, self.temperature, same_BB, uniform_B2[:, 0])
        image_of_text = losses.hard_negatives(similarity_BB.T, self.temperature, same_BB, uniform_B2[:, 1])
        image_MPW = torch.cat([image_BPW, image_BPW, image_BPW[image_of_text]])
        ids_MT = torch.cat([ids_BT, ids_BT[text_of_image], ids_BT])
        mask_MT = torch.cat([mask_BT, mask_BT[text_of_image], mask_BT])
        queries = len(self.query_tokens)
        query_MQD = self.qformer(
            ids_MT,
            attention_mask=torch.cat([mask_MT.new_ones(len(mask_MT), queries), mask_MT], dim=1),
            query_embeds=self._queries(len(ids_MT)),
            encoder_hidden_states=image_MPW,
        ).last_hidden_state[:, :queries]
        matched_M = torch.arange(len(ids_MT), device=ids_MT.device) < len(ids_BT)
        return F.cross_entropy(self.matching_head(query_MQD).mean(1).float(), matched_M.long())

    def caption(self, image_BPW: Tensor, _kept: list[Tensor], ids_BT: Tensor) -> Tensor:
        """Texts beside their queries, from left to right. Padding stands on the right, where no token sees it."""
        batch, tokens = ids_BT.shape
        queries = len(self.query_tokens)
        mask_SS = ids_BT.new_ones(queries + tokens, queries + tokens, dtype=torch.bool).tril()
        mask_SS[:queries, :queries] = True
        return self.qformer(
            ids_BT,
            attention_mask=mask_SS.expand(batch, 1, -1, -1),
            query_embeds=self._queries(batch),
            encoder_hidden_states=image_BPW,
        ).last_hidden_state[:, queries:]

    def caption_from_kept(self, _image_BPW: Tensor, kept: list[Tensor], ids_BT: Tensor) -> Tensor:
        """As `caption`, from the keys and values of queries that are encoded already."""
        tokens, queries = ids_BT.shape[1], len(self.query_tokens)
        mask_TS = ids_BT.new_ones(tokens, queries + tokens, dtype=torch.bool).tril(queries)
        x_BTD = self.qformer.embeddings(input_ids=ids_BT)
        for layer, key_BQD, value_BQD in zip(self._layers, kept[::2], kept[1::2], strict=True):
            attention = layer.attention.attention
            query, key, value = (
                x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
                for x in (
                    attention.query(x_BTD),
                    torch.cat([key_BQD, attention.key(x_BTD)], dim=1),
                    torch.cat([value_BQD, attention.value(x_BTD)], dim=1),
                )
            )
            dropout = attention.attention_dropout if self.training else 0.0
            seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_TS, dropout_p=dropout)
            x_BTD = layer.feed_forward_chunk(layer.attention.output(seen.transpose(1, 2).flatten(2), x_BTD))
        return x_BTD

    @property
    def _layers(self) -> list[Any]:
        return list(self.qformer.encoder.layer)

    def _queries(self, batch: int) -> Tensor:
        return self.query_tokens.expand(batch, -1, -1)

    def _pad(self, rows: list[list[int]], text_tokens: int | None) -> tuple[Tensor, Tensor]:
        ids_BT, mask_BT = self.tokenizer.pad_rows(rows)
        missing = max(0, (text_tokens or 0) - ids_BT.shape[1])
        device = self.temperature.device
        return F.pad(ids_BT, (0, missing), value=self.tokenizer.pad).to(device), F.pad(mask_BT, (0, missing)).to(device)


# From MQ-Former's names to the peer's, first match wins.
_NAMES = (
    (r"^(image_norm|image_projection|text_projection|matching_head|temperature)", r"\1"),
    (r"^visual_queries$", "query_tokens"),
    (r"^(word_embeddings|position_embeddings)", r"qformer.embeddings.\1"),
    (r"^embedding_norm", "qformer.embeddings.layernorm"),
    (r"^text_head\.dense", "language_head.transform.dense"),
    (r"^text_head\.norm", "language_head.transform.LayerNorm"),
    (r"^text_head\.bias", "language_head.bias"),
    (r"^(layers\.\d+)\.attention\.(query|key|value)", r"\1.attention.attention.\2"),
    (r"^(layers\.\d+)\.attention\.out", r"\1.attention.output.dense"),
    (r"^(layers\.\d+)\.attention\.norm", r"\1.attention.output.LayerNorm"),
    (r"^(layers\.\d+)\.cross_attention\.query", r"\1.crossattention.attention.query"),
    (r"^(layers\.\d+)\.cross_attention\.(key|value)\.visual", r"\1.crossattention.attention.\2"),
    (r"^(layers\.\d+)\.cross_attention\.out", r"\1.crossattention.output.dense"),
    (r"^(layers\.\d+)\.cross_attention\.norm", r"\1.crossattention.output.LayerNorm"),
    (r"^(layers\.\d+)\.text_feed_forward\.inner", r"\1.intermediate.dense"),
    (r"^(layers\.\d+)\.text_feed_forward\.outer", r"\1.output.dense"),
    (r"^(layers\.\d+)\.text_feed_forward\.norm", r"\1.output.LayerNorm"),
    (r"^(layers\.\d+)\.query_feed_forward\.inner", r"\1.intermediate_query.dense"),
    (r"^(layers\.\d+)\.query_feed_forward\.outer", r"\1.output_query.dense"),
    (r"^(layers\.\d+)\.query_feed_forward\.norm", r"\1.output_query.LayerNorm"),
)


def peer_name(name: str) -> str | None:
    """Where a parameter of MQ-Former lies in the peer; None where the peer has no such thing."""
    for pattern, replacement in _NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return re.sub(r"^layers\.", "qformer.encoder.layer.", renamed)
    return None


@torch.no_grad()
def copy_weights(mq_former: MQFormer, peer: Peer) -> None:
    """Give the peer MQ-Former's weights; every parameter of the peer gets one."""
    places = dict(peer.named_parameters())
    for name, parameter in mq_former.named_parameters():
        theirs = peer_name(name)
        if theirs is not None:
            places.pop(theirs).copy_(parameter)
    assert not places, f"nothing to fill {sorted(places)}"
