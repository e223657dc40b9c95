"""Lyrics: what the queries saw, projected into a frozen language model (paper section 4).

Shapes: B batch, Q queries, T text tokens, S sequence, D MQ-Former width, E language width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.language import IGNORED, PromptTemplate, Sequences, assemble
from lyrics.model.mq_former import MQFormer
from lyrics.model.projection import Projection

STAGE1_HEADS = ("text_head", "image_projection", "text_projection", "matching_head", "temperature")


class LyricsModel(nn.Module):
    """MQ-Former, projection and language model, on features of the frozen parts."""

    def __init__(
        self,
        mq_former: MQFormer,
        projection: Projection,
        llm: PeftModel,
        *,
        text_tokenizer: TextTokenizer,
        template: PromptTemplate,
        spatial_text_in_llm: bool,
    ) -> None:
        super().__init__()
        self.mq_former, self.projection, self.llm = mq_former, projection, llm
        self.text_tokenizer, self.template = text_tokenizer, template
        self.spatial_text_in_llm = spatial_text_in_llm

    @property
    def _base(self) -> Any:
        """The language model below its adapter; which class it is depends on the preset."""
        return self.llm.get_base_model()

    @property
    def device(self) -> torch.device:
        return self.projection.linear.weight.device

    def query_tokens(self, instructions: Sequence[str], seen: Sequence[SeenImage]) -> Tensor:
        """tokens_BQE: what the queries saw, as the language model reads it."""
        return self.projection(self.query_outputs(instructions, seen))

    def query_outputs(self, instructions: Sequence[str], seen: Sequence[SeenImage]) -> Tensor:
        """query_BQD: the queries read instruction and spatial representation while they look at the picture."""
        t, limit = self.text_tokenizer, self.mq_former.config.max_text_tokens
        rows = [
            [t.cls, *t.ids(i), t.sep, *t.ids(s.spatial_text)][: limit - 1] + [t.sep]
            for i, s in zip(instructions, seen, strict=True)
        ]
        ids_BT, mask_BT = (x.to(self.device) for x in t.pad_rows(rows))
        visual = t.visual_batch(seen).to(self.device)
        memory = self.mq_former.look(visual.image_tokens_BPD, visual.local)
        return self.mq_former("instruction", memory, ids_BT, mask_BT)[0]

    def embed(self, sequences: Sequences, tokens_BQE: Tensor) -> Tensor:
        """inputs_BSE with the query tokens in their places."""
        embedded_BSE = self._base.get_input_embeddings()(sequences.ids_BS.to(self.device))
        where_BS1 = sequences.image_mask_BS.to(self.device).unsqueeze(-1)
        return embedded_BSE.masked_scatter(where_BS1, tokens_BQE.to(embedded_BSE.dtype))

    def forward(
        self,
        instructions: Sequence[str],
        seen: Sequence[SeenImage],
        answers: Sequence[str],
        spatial_texts: Sequence[str],
        average: Literal["tokens", "samples"] = "tokens",
    ) -> Tensor:
        """Mean cross-entropy of the answers' tokens, over all tokens or over samples (`average`).

        Over tokens a caption outweighs a one-word answer tenfold; over samples they count alike.

        Args:
            spatial_texts: what the language model reads of the picture's objects ("" for nothing).
        """
        tokens_BQE = self.query_tokens(instructions, seen)
        prompts = [self.template.prompt(i, s) for i, s in zip(instructions, spatial_texts, strict=True)]
        sequences = assemble(
            prompts, tokens_BQE.shape[1], pad=self.template.pad, answers=[self.template.answer(a) for a in answers]
        )
        labels_BS = sequences.labels_BS.to(self.device)
        hidden_BSE = self._base.model(
            inputs_embeds=self.embed(sequences, tokens_BQE), attention_mask=sequences.mask_BS.to(self.device)
        )[0]
        asked_BS = labels_BS[:, 1:] != IGNORED  # position s predicts the label at s + 1
        logits_MV = self._base.lm_head(hidden_BSE[:, :-1][asked_BS])
        loss_M = F.cross_entropy(logits_MV.float(), labels_BS[:, 1:][asked_BS], reduction="none")
        if average == "tokens":
            return loss_M.mean()
        tokens_B1 = asked_BS.sum(1, keepdim=True)
        return (loss_M / tokens_B1.expand_as(asked_BS)[asked_BS]).sum() / len(labels_BS)

    @torch.inference_mode()
    def generate(
        self,
        instructions: Sequence[str],
        seen: Sequence[SeenImage],
        spatial_texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
    ) -> list[str]:
        """Greedy answers. `spatial_texts` replaces what the language model reads of the objects."""
        if spatial_texts is None:
            spatial_texts = [s.spatial_text for s in seen]
        if not self.spatial_text_in_llm:
            spatial_texts = [""] * len(seen)
        tokens_BQE = self.query_tokens(instructions, seen)
        prompts = [self.template.prompt(i, s) for i, s in zip(instructions, spatial_texts, strict=True)]
        sequences = assemble(prompts, tokens_BQE.shape[1], pad=self.template.pad)
        ids_BS = self.llm.generate(
            inputs_embeds=self.embed(sequences, tokens_BQE),
            attention_mask=sequences.mask_BS.long().to(self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=self.template.pad,
            eos_token_id=self.template.end,
        )
        return [self.template.decode(row) for row in ids_BS.tolist()]
