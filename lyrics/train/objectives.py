"""The four objectives of stage 1 on one batch of MQ-Former (paper section 3).

Shapes: B pairs in the joint batch, b of them on this rank, P pairs of a picture and a text, M tokens asked for,
T text tokens, Q queries, D width, C contrastive width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from lyrics.model.inputs import TextTokenizer
from lyrics.model.mq_former import EncodedQueries, Memory, MQFormer
from lyrics.train import losses
from lyrics.train.devices import ALONE, Ranks
from lyrics.train.stage1_batches import Stage1Batch

MATCHING_PARTS = 3  # pairs of like length are padded together, where that pays
# Each part sends gradients of its own to every weight: at paper width and 8 pairs a step in three parts took 1.1 times
# as long as in one that pads a twentieth more.
WORTH_PARTS = 1.2
GROUPS = ("align", "generate")
TEMPERATURES = (0.001, 0.5)  # least and most


@dataclasses.dataclass(frozen=True)
class Looked:
    """A batch of pictures after its keys, values and queries were computed: what the objectives share."""

    memory: Memory
    encoded: EncodedQueries


class Objectives(nn.Module):
    """ITC, ITM, ICG and MSP on one batch. Each loss is this rank's share of the joint one."""

    def __init__(
        self,
        mq_former: MQFormer,
        tokenizer: TextTokenizer,
        *,
        itc_cross_query: bool,
        smoothing: float,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__()
        self.mq_former, self.tokenizer = mq_former, tokenizer
        self.itc_cross_query, self.smoothing, self.ranks = itc_cross_query, smoothing, ranks

    def forward(
        self, batch: Stage1Batch, groups: tuple[str, ...] = GROUPS, totals: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Losses of the groups asked for: `align` (ITC of both kinds of query, ITM) and `generate` (ICG, MSP).

        Args:
            totals: what each loss is divided by, where this batch is part of a larger one; else its own.
        """
        totals = batch.totals if totals is None else totals
        looked = self.look(batch)
        found: dict[str, Tensor] = {}
        if "align" in groups:
            found |= self.align(batch, looked)
        if "generate" in groups:
            found |= {"icg_loss": self.captioning(batch, looked), "msp_loss": self.masked_spatial(batch, looked)}
        return {name: loss / max(1, totals[name]) for name, loss in found.items()}

    def look(self, batch: Stage1Batch) -> Looked:
        visual = batch.visual.to(self._device)
        memory = self.mq_former.look(visual.image_tokens_BPD, visual.local)
        return Looked(memory, self.mq_former.encode_queries(memory))

    def align(self, batch: Stage1Batch, looked: Looked) -> dict[str, Tensor]:
        """ITC of both kinds of query, and ITM on negatives drawn by their similarity."""
        query_bQC, caption_bC, spatial_bC = self.contrastive_features(batch, looked)
        sizes = [query_bQC.shape[1], 1, 1]
        joint_BXC = self.ranks.gather(torch.cat([query_bQC, caption_bC[:, None], spatial_bC[:, None]], dim=1))
        query_BQC, caption_BC, spatial_BC = joint_BXC.split(sizes, dim=1)
        visual_bVC, grounding_bGC = self.mq_former.split_queries(query_bQC)
        visual_BVC, grounding_BGC = self.mq_former.split_queries(query_BQC)
        caption = self._both_ways(visual_bVC, visual_BVC, caption_bC, caption_BC[:, 0])
        spatial = self._both_ways(grounding_bGC, grounding_BGC, spatial_bC, spatial_BC[:, 0])
        first, own = batch.own.start, batch.own
        return {
            "itc_loss": losses.contrastive_loss(
                *caption, self.temperature, self._to(batch.same_caption_BB[own]), self.smoothing, first
            ),
            "itc_spatial_loss": losses.contrastive_loss(
                *spatial, self.temperature, self._to(batch.same_spatial_BB[own]), self.smoothing, first
            ),
            "itm_loss": losses.matching_loss(
                *self.matching_logits(batch, looked, caption[0].detach(), caption[1].detach())
            ),
        }

    def contrastive_features(self, batch: Stage1Batch, looked: Looked) -> tuple[Tensor, Tensor, Tensor]:
        """Of this rank's pairs: query_bQC, caption_bC, spatial_bC."""
        query_bQD = looked.encoded.query_PQD
        if not self.itc_cross_query:
            query_bQD = self.mq_former.encode_queries(looked.memory, cross_query=False).query_PQD
        return (
            self.mq_former.image_projection(query_bQD),
            self.encode_text(batch.caption_rows[batch.own]),
            self.encode_text(batch.spatial_rows[batch.own]),
        )

    def _both_ways(
        self, query_bQC: Tensor, query_BQC: Tensor, text_bC: Tensor, text_BC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Similarity_bB of this rank's pictures with all texts, and of its texts with all pictures."""
        image_to_text_bB = losses.query_text_similarity(query_bQC, text_BC)
        if self.ranks.size == 1:
            return image_to_text_bB, image_to_text_bB.T
        return image_to_text_bB, losses.query_text_similarity(query_BQC, text_bC).T

    def encode_text(self, rows: list[list[int]]) -> Tensor:
        """text_bC: projected [CLS] of each text."""
        t, limit = self.tokenizer, self.mq_former.config.max_text_tokens
        ids_bT, mask_bT = map(self._to, t.pad_rows([[t.cls, *row][: limit - 1] + [t.sep] for row in rows]))
        _, cls_b1D = self.mq_former("contrastive", None, ids_bT, mask_bT, wanted="cls")
        return self.mq_former.text_projection(cls_b1D[:, 0])

    def matching_logits(
        self, batch: Stage1Batch, looked: Looked, image_to_text_bB: Tensor, text_to_image_bB: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits_P2 and matched_P: each pair, its picture with a hard negative caption, its caption with a picture.

        They come by the lengths of their texts. A rank computes the pairs of its own pictures, whose captions may
        be another rank's: ids travel, pictures don't.
        """
        own = batch.own
        text_of_image_b, image_of_text_b = self._hard_negatives(batch, image_to_text_bB, text_to_image_bB)
        image_of_text_B = self.ranks.gather(self._to(image_of_text_b)).cpu()
        rows_b = torch.arange(own.start, own.stop)
        with_text_b = text_of_image_b >= 0
        texts = torch.where((image_of_text_B >= own.start) & (image_of_text_B < own.stop))[0]
        picture_P = torch.cat([rows_b, rows_b[with_text_b], image_of_text_B[texts]])
        caption_P = torch.cat([rows_b, text_of_image_b[with_text_b], texts])
        t, limit = self.tokenizer, self.mq_former.config.max_text_tokens
        pairs = zip(picture_P.tolist(), caption_P.tolist(), strict=True)
        rows = [[t.cls, *batch.caption_rows[c], t.sep, *batch.spatial_rows[p]][: limit - 1] + [t.sep] for p, c in pairs]
        picture_P, caption_P = picture_P - own.start, caption_P - own.start
        logits, matched = [], []
        by_length_P = np.argsort([len(row) for row in rows], kind="stable")
        for part in np.array_split(by_length_P, self._matching_parts(batch)):
            ids_PT, mask_PT = map(self._to, t.pad_rows([rows[i] for i in part]))
            memory = looked.memory.index(self._to(picture_P[part]))
            query_PQD, _ = self.mq_former("matching", memory, ids_PT, mask_PT, wanted="queries")
            logits.append(self.mq_former.matching_head(query_PQD).mean(1))
            matched.append(self._to(picture_P[part] == caption_P[part]))
        return torch.cat(logits), torch.cat(matched)

    def _hard_negatives(
        self, batch: Stage1Batch, image_to_text_bB: Tensor, text_to_image_bB: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A text for each picture and a picture for each text of this rank. On the CPU: MPS has no float64."""
        same_bB, uniform_b2 = batch.same_caption_BB[batch.own], batch.uniform_B2[batch.own]
        temperature = self.temperature.detach().cpu()
        return (
            losses.hard_negatives(image_to_text_bB.cpu(), temperature, same_bB, uniform_b2[:, 0]),
            losses.hard_negatives(text_to_image_bB.cpu(), temperature, same_bB, uniform_b2[:, 1]),
        )

    def _matching_parts(self, batch: Stage1Batch) -> int:
        """Judged by the pairs of the joint batch: FSDP2 gathers in each part, so all ranks need as many, none empty."""
        config = self.mq_former.config
        pairs = zip(batch.caption_rows, batch.spatial_rows, strict=True)
        lengths = sorted(min(3 + len(caption) + len(spatial), config.max_text_tokens) for caption, spatial in pairs)
        parts = min(MATCHING_PARTS, batch.own.stop - batch.own.start)
        padded = sum(len(part) * (config.queries + part[-1]) for part in np.array_split(lengths, parts))
        return parts if len(lengths) * (config.queries + lengths[-1]) > WORTH_PARTS * padded else 1

    def captioning(self, batch: Stage1Batch, looked: Looked) -> Tensor:
        """ICG: the caption from left to right, from the queries."""
        t = self.tokenizer
        rows = [[t.dec, *row, t.sep] for row in batch.caption_rows[batch.own]]
        ids_bT, mask_bT = map(self._to, t.pad_rows(rows))
        asked_bT, labels_bT = mask_bT[:, 1:], ids_bT[:, 1:]  # position t predicts the token at t + 1; the last, none
        _, text_bTD = self.mq_former(
            "captioning", looked.memory, ids_bT[:, :-1], mask_bT[:, :-1], encoded=looked.encoded
        )
        return losses.token_loss(self.mq_former.text_logits(text_bTD[asked_bT]), labels_bT[asked_bT])

    def masked_spatial_logits(self, batch: Stage1Batch, looked: Looked) -> tuple[Tensor, Tensor]:
        """Logits_MV and labels_M of the hidden tokens. The local tokens hide what is asked for."""
        local = dataclasses.replace(
            batch.visual.local.to(self._device),
            hidden_tag_BN=self._to(batch.hidden_tag_bN),
            hidden_box_BN=self._to(batch.hidden_box_bN),
        )
        memory = self.mq_former.look_again(looked.memory, local)
        t, limit = self.tokenizer, self.mq_former.config.max_text_tokens
        ids_bT, mask_bT = map(self._to, t.pad_rows([[t.cls, *row][: limit - 1] + [t.sep] for row in batch.msp_rows]))
        labels = torch.full_like(ids_bT, losses.IGNORED, device="cpu")
        for row, values in enumerate(batch.msp_labels):
            kept = values[: limit - 2]
            labels[row, 1 : 1 + len(kept)] = torch.tensor(kept)
        _, text_bTD = self.mq_former("masked_spatial", memory, ids_bT, mask_bT, wanted="text")
        labels_bT = self._to(labels)
        asked_bT = labels_bT != losses.IGNORED
        return self.mq_former.text_logits(text_bTD[asked_bT]), labels_bT[asked_bT]

    def masked_spatial(self, batch: Stage1Batch, looked: Looked) -> Tensor:
        """MSP: hidden tags and boxes of the spatial representation; 0 for a batch without objects."""
        return losses.token_loss(*self.masked_spatial_logits(batch, looked))

    @property
    def temperature(self) -> Tensor:
        return self.mq_former.temperature

    @torch.no_grad()
    def bound_temperature(self, *_: object) -> None:
        """After each step: were it bounded as it is used, it would get no gradient beyond, and never come back."""
        self.mq_former.temperature.clamp_(*TEMPERATURES)

    @property
    def _device(self) -> torch.device:
        return self.mq_former.temperature.device

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)
