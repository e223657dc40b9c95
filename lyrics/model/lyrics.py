"""Lyrics: what the queries saw, projected into a frozen language model (paper section 4).

Shapes: B batch, Q queries, T text tokens, R rows of S positions, M answer tokens, D MQ-Former width, E language width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lyrics.model.inputs import SeenImage, TextTokenizer
from lyrics.model.language import (
    GREEDY,
    IGNORED,
    OBJECT,
    WORD,
    Conversation,
    Decoding,
    PromptTemplate,
    Sequences,
    assemble,
    mark_objects,
)
from lyrics.model.mq_former import Memory, MQFormer
from lyrics.model.projection import Projection

Texts = str | tuple[str, ...]  # of one sample: a text, or one for each turn of a dialogue
Average = Literal["tokens", "answers"]


class Read:
    """What the language model has read in one dialogue: inputs_1SE, and their keys and values."""

    def __init__(self) -> None:
        self.inputs_1SE: Tensor | None = None
        self.cache = DynamicCache()

    def resume(self, inputs_1SE: Tensor) -> DynamicCache:
        """Keys and values of as much of `inputs_1SE` as was read before, but for its last position."""
        read, self.inputs_1SE = self.inputs_1SE, None  # until `keep`: what an interrupted answer leaves is of no use
        if read is None:
            self.cache = DynamicCache()
        else:
            length = min(read.shape[1], inputs_1SE.shape[1] - 1)
            same_S = (read[0, :length] == inputs_1SE[0, :length]).all(-1)
            if (unlike := int(same_S.cumprod(0).sum()) - self.cache.get_seq_length()) < 0:
                self.cache.crop(unlike)
        return self.cache

    def keep(self, inputs_1SE: Tensor) -> None:
        """`inputs_1SE` with what was said; the last token said has not been read yet."""
        self.inputs_1SE = inputs_1SE[:, : self.cache.get_seq_length()]


class LyricsModel(nn.Module):
    """MQ-Former, projection and language model, on features of the frozen parts.

    Args:
        llm: in training with its adapter, for answers merged with it.
        packing: whether training puts several samples into a row, instead of padding each to the longest.
    """

    def __init__(
        self,
        mq_former: MQFormer,
        projection: Projection,
        llm: PeftModel | PreTrainedModel,
        *,
        text_tokenizer: TextTokenizer,
        template: PromptTemplate,
        spatial_text_in_llm: bool,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.mq_former, self.projection = mq_former, projection
        self.llm: Any = llm
        self.text_tokenizer, self.template = text_tokenizer, template
        self.spatial_text_in_llm, self.packing = spatial_text_in_llm, packing

    @property
    def _base(self) -> Any:
        """The language model below its adapter; which class it is depends on the preset."""
        return self.llm.get_base_model() if isinstance(self.llm, PeftModel) else self.llm

    @property
    def language_layers(self) -> list[nn.Module]:
        return list(self._base.model.layers)

    @property
    def tokens_beside_objects(self) -> bool:
        """Whether each grounding query has objects of its own, and its token stands beside them in the text."""
        config = self.mq_former.config
        return self.spatial_text_in_llm and config.grounding == "per_object" and config.grounding_queries > 0

    @property
    def device(self) -> torch.device:
        return self.projection.linear.weight.device

    def look(self, seen: Sequence[SeenImage]) -> Memory:
        """Keys and values of pictures, which no question changes: one picture's serve all questions about it."""
        visual = self.text_tokenizer.visual_batch(seen).to(self.device)
        return self.mq_former.look(visual.image_tokens_BPD, visual.local)

    def query_tokens(
        self, instructions: Sequence[Texts], seen: Sequence[SeenImage], memory: Memory | None = None
    ) -> Tensor:
        """tokens_BQE: what the queries saw, as the language model reads it."""
        return self.projection(self.query_outputs(instructions, seen, memory))

    def query_outputs(
        self, instructions: Sequence[Texts], seen: Sequence[SeenImage], memory: Memory | None = None
    ) -> Tensor:
        """query_BQD: the queries read instruction and spatial representation while they look at the picture.

        Of a dialogue they read the first question: a later one could give away an answer before it.

        Args:
            memory: what `look` gave for `seen`; None looks now.
        """
        t, limit = self.text_tokenizer, self.mq_former.config.max_text_tokens
        rows = [
            [t.cls, *t.ids(_turns(i)[0]), t.sep, *t.ids(s.spatial_text)][: limit - 1] + [t.sep]
            for i, s in zip(instructions, seen, strict=True)
        ]
        ids_BT, mask_BT = (x.to(self.device) for x in t.pad_rows(rows))
        memory = self.look(seen) if memory is None else memory
        return self.mq_former("instruction", memory, ids_BT, mask_BT, wanted="queries")[0]

    def embed(self, sequences: Sequences, tokens_BQE: Tensor) -> Tensor:
        """inputs_RSE with the query tokens in their places."""
        embedded_RSE = self._base.get_input_embeddings()(sequences.ids_RS.to(self.device))
        query_RS, sample_RS = sequences.query_RS.to(self.device), sequences.sample_RS.to(self.device)
        seen_RS = query_RS != WORD
        tokens_XE = tokens_BQE[sample_RS[seen_RS], query_RS[seen_RS]]
        return embedded_RSE.masked_scatter(seen_RS.unsqueeze(-1), tokens_XE.to(embedded_RSE.dtype))

    def forward(
        self,
        instructions: Sequence[Texts],
        seen: Sequence[SeenImage],
        answers: Sequence[Texts],
        spatial_texts: Sequence[str],
        average: Average = "tokens",
        *,
        total: float | None = None,
    ) -> Tensor:
        """Mean cross-entropy of the answers' tokens, over all tokens or over answers (`average`).

        Over tokens a caption outweighs a one-word answer tenfold; over answers they count alike. Every turn of a
        dialogue carries loss.

        Args:
            spatial_texts: what the language model reads of the picture's objects ("" for nothing).
            total: what the sum is divided by: `normaliser` of the batch that this one is a part of, where a step
                spreads over several; None for that of this batch.
        """
        tokens_BQE = self.query_tokens(instructions, seen)
        conversations = [
            self.conversation(i, a, s) for i, a, s in zip(instructions, answers, spatial_texts, strict=True)
        ]
        layout: Literal["packed", "right"] = "packed" if self.packing else "right"
        sequences = assemble(conversations, pad=self.template.pad, layout=layout)
        loss_M, answer_M = self.token_losses(sequences, tokens_BQE)
        if average == "answers":
            loss_M = loss_M / torch.bincount(answer_M)[answer_M]
        return loss_M.sum() / (self.normaliser(answers, average) if total is None else total)

    def normaliser(self, answers: Sequence[Texts], average: Average = "tokens") -> float:
        """What the loss of a batch is divided by: its answers' tokens, or its answers. Needs no forward pass."""
        said = [text for texts in answers for text in _turns(texts)]
        return float(len(said) if average == "answers" else sum(len(self.template.answer(text)) for text in said))

    def token_losses(self, sequences: Sequences, tokens_BQE: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each answer token, loss_M, and the answer it belongs to, answer_M."""
        labels_RS, answer_RS = sequences.labels_RS.to(self.device), sequences.answer_RS.to(self.device)
        hidden_RSE = self._base.model(
            inputs_embeds=self.embed(sequences, tokens_BQE),
            use_cache=False,
            **{name: x.to(self.device) for name, x in sequences.attention().items()},
        )[0]
        asked_RS = labels_RS[:, 1:] != IGNORED  # position s predicts the label at s + 1
        logits_MV = self._base.lm_head(hidden_RSE[:, :-1][asked_RS])
        loss_M = F.cross_entropy(logits_MV.float(), labels_RS[:, 1:][asked_RS], reduction="none")
        return loss_M, answer_RS[:, 1:][asked_RS]

    @torch.inference_mode()
    def generate(
        self,
        instructions: Sequence[Texts],
        seen: Sequence[SeenImage],
        spatial_texts: Sequence[str] | None = None,
        max_new_tokens: int = 32,
        decoding: Decoding = GREEDY,
        *,
        said: Sequence[Texts] | None = None,
        memory: Memory | None = None,
        read: Read | None = None,
    ) -> list[str]:
        """Answers to the last question of each sample.

        Args:
            spatial_texts: replaces what the language model reads of the objects, or MQ-Former where that alone reads
                them.
            said: the answers to the questions before the last, where `instructions` are dialogues.
            memory: what `look` gave for `seen`; None looks now.
            read: of one sample whose dialogue goes on; only what is new in it is read, and `read` grows. No beams.
        """
        told = [s.told if spatial_texts is None else None for s in seen]
        if spatial_texts is None:
            spatial_texts = [s.spatial_text for s in seen]
        elif not self.spatial_text_in_llm:
            pairs = zip(seen, spatial_texts, strict=True)
            seen = [dataclasses.replace(s, spatial_text=text, told=None) for s, text in pairs]
        tokens_BQE = self.query_tokens(instructions, seen, memory)
        said = [()] * len(seen) if said is None else said
        rows = zip(instructions, said, spatial_texts, told, strict=True)
        conversations = [self.conversation(*row) for row in rows]
        sequences = assemble(conversations, pad=self.template.pad, layout="left")
        inputs_BSE = self.embed(sequences, tokens_BQE)
        draws = decoding.temperature > 0
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else [], enabled=draws):
            if draws:  # seeding takes as long as a layer of a small model
                torch.manual_seed(decoding.seed)
            ids_BS = self.llm.generate(
                inputs_embeds=inputs_BSE,
                past_key_values=None if read is None else read.resume(inputs_BSE),
                attention_mask=sequences.mask().long().to(self.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=self.template.pad,
                eos_token_id=self.template.end,
                **decoding.settings(),
            )
        if read is not None:
            read.keep(torch.cat([inputs_BSE, self._base.get_input_embeddings()(ids_BS)], dim=1))
        return [self.template.decode(row) for row in ids_BS.tolist()]

    def conversation(
        self, questions: Texts, answers: Texts, spatial_text: str, told: Sequence[int] | None = None
    ) -> Conversation:
        """What the language model reads: query tokens, objects, questions, answers."""
        return self.template.conversation(_turns(questions), _turns(answers), *self.shown(spatial_text, told))

    def shown(self, spatial_text: str, told: Sequence[int] | None = None) -> tuple[str, Sequence[int], Sequence[int]]:
        """The spatial text as the language model reads it, the queries before it, and those beside its objects.

        A query that has objects of its own stands beside them in the text; all others come first.

        Args:
            told: which objects the text tells of, by number; None for all.
        """
        config = self.mq_former.config
        if not self.spatial_text_in_llm:
            spatial_text = ""
        if not spatial_text or not self.tokens_beside_objects:
            return spatial_text, range(config.queries), ()
        marked = mark_objects(spatial_text)
        objects = range(marked.count(OBJECT)) if told is None else told
        beside = [config.visual_queries + n % config.grounding_queries for n in objects]
        return marked, range(config.visual_queries), beside


def _turns(texts: Texts) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else texts
