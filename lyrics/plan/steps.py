"""One training step of each stage on tensors of the planned shapes: the modules and losses that the stages use, with
texts of given lengths in place of a tokenizer's. tests/test_plan.py compares its products with the stage's own.

Shapes: B pictures, T text tokens, S sequence, N objects, Q queries, M asked tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyrics import numerics, optimizer
from lyrics.config import Config, Optimizer
from lyrics.model.attention import Lanes, Memory
from lyrics.model.local_tokens import LocalFeatures
from lyrics.model.mq_former import EncodedQueries, MQFormer
from lyrics.plan.hardware import Assumptions
from lyrics.plan.parts import Parts
from lyrics.train import losses
from lyrics.train.trainable import train_only

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes:
    """Of one batch: how many pictures, and how long its longest texts are."""

    batch: int
    patches: int
    objects: int
    tag_tokens: int
    caption: int
    spatial: int
    instruction: int
    prompt: int
    caption_prompt: int
    answer: int
    masked: int


def shapes(config: Config, assumed: Assumptions, patches: int, batch: int) -> Shapes:
    """Of a batch of the preset; texts are cut as the stages cut them."""
    limit = config.mq_former.max_text_tokens
    objects = min(assumed.objects, config.refine.max_objects)
    spatial = min(objects * assumed.object_tokens, limit - 2)
    queries = config.mq_former.visual_queries + config.mq_former.grounding_queries
    prompt = assumed.prompt_tokens + queries + assumed.instruction_tokens
    read = objects * assumed.object_tokens_llm if config.stage2.spatial_text == "llm" else 0
    return Shapes(
        batch=batch,
        patches=patches,
        objects=objects,
        tag_tokens=assumed.tag_tokens,
        caption=assumed.caption_tokens,
        spatial=spatial,
        instruction=min(assumed.instruction_tokens + 2 + spatial, limit),
        prompt=prompt + read,
        caption_prompt=prompt,
        answer=assumed.answer_tokens,
        masked=max(1, round(spatial * assumed.masked_share)),
    )


@dataclasses.dataclass(frozen=True)
class Trainee:
    """What a stage holds on its device, and how it takes one step.

    Attributes:
        loss: of a step of one kind; steps of some stages differ (`stage1.objectives`, `stage2.caption_steps`).
        shares: how many of the steps are of each kind.
    """

    module: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    loss: Callable[[int], Tensor]
    shares: tuple[float, ...]
    grad_clip: float

    def step(self, kind: int) -> None:
        """As `lyrics.train.loop.fit` does: gradients of the step before live until the losses are there."""
        loss = self.loss(kind)
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], self.grad_clip)
        for one in self.optimizers:
            one.step()


def stage1(config: Config, parts: Parts, s: Shapes) -> Trainee:
    """`pretrain`, on fresh MQ-Former weights."""
    mq_former, settings = parts.mq_former.train(), config.stage1
    image_BPD, local = _seen(mq_former, s)
    captions, spatials, both = s.caption + 2, s.spatial + 2, s.caption + s.spatial + 3
    both = min(both, config.mq_former.max_text_tokens)
    pairs = 3 * s.batch
    same_BB = torch.eye(s.batch, dtype=torch.bool)
    matched_P = torch.arange(pairs) < s.batch

    def text(length: int) -> Tensor:
        _, cls_B1D = mq_former("contrastive", None, *_text(s.batch, length), wanted="cls")
        return mq_former.text_projection(cls_B1D[:, 0])

    def align(memory: Memory, encoded: EncodedQueries) -> list[Tensor]:
        visual_BVC, grounding_BGC = mq_former.split_queries(mq_former.image_projection(encoded.query_PQD))
        itc = []
        for queries_BQC, length in ((visual_BVC, captions), (grounding_BGC, spatials)):
            similarity_BB = losses.query_text_similarity(queries_BQC, text(length))
            itc.append(
                losses.contrastive_loss(
                    similarity_BB, similarity_BB.T, mq_former.temperature, same_BB, settings.label_smoothing
                )
            )
        rows = Memory(memory.layers, memory.pictures, Lanes(torch.arange(pairs), pairs // s.batch))
        query_PQD, _ = mq_former("matching", rows, *_text(pairs, both), wanted="queries")
        return [*itc, losses.matching_loss(mq_former.matching_head(query_PQD).mean(1), matched_P)]

    def generate(memory: Memory, encoded: EncodedQueries) -> list[Tensor]:
        ids_BT, mask_BT = _text(s.batch, captions)
        _, text_BTD = mq_former("captioning", memory, ids_BT, mask_BT, encoded=encoded)
        icg = losses.token_loss(
            mq_former.text_logits(text_BTD[:, :-1].flatten(0, 1)), torch.zeros(s.batch * (captions - 1)).long()
        )
        hidden_BN = torch.zeros(s.batch, s.objects, dtype=torch.bool)
        hiding = dataclasses.replace(local, hidden_tag_BN=hidden_BN, hidden_box_BN=hidden_BN)
        again = mq_former.look_again(memory, hiding)
        _, text_BTD = mq_former("masked_spatial", again, *_text(s.batch, spatials), wanted="text")
        asked_MD = text_BTD[:, : s.masked].flatten(0, 1)
        labels_M = torch.zeros(len(asked_MD), dtype=torch.long)
        return [icg, losses.token_loss(mq_former.text_logits(asked_MD), labels_M)]

    def loss(kind: int) -> Tensor:
        with numerics.autocast(CPU, settings.precision):
            memory = mq_former.look(image_BPD, local)
            encoded = mq_former.encode_queries(memory)
            if settings.objectives == "alternate":
                return torch.stack([x.sum() for x in (align, generate)[kind](memory, encoded)]).sum()
            return torch.stack([x.sum() for x in (*align(memory, encoded), *generate(memory, encoded))]).sum()

    optimizers = _optimizers(mq_former, settings.optimizer, lambda _: settings.optimizer.lr)
    shares = (0.5, 0.5) if settings.objectives == "alternate" else (1.0,)
    return Trainee(mq_former, optimizers, loss, shares, settings.optimizer.grad_clip)


def stage2(config: Config, parts: Parts, s: Shapes) -> Trainee:
    """`finetune`: MQ-Former without its heads, projection and adapter."""
    mq_former, projection, llm, settings = parts.mq_former, parts.projection, parts.llm, config.stage2
    module = nn.ModuleDict({"mq_former": mq_former, "projection": projection, "llm": llm}).train()
    train_only(module, settings.trainable, "stage2.trainable")
    base = llm.get_base_model()
    image_BPD, local = _seen(mq_former, s)
    queries = config.mq_former.visual_queries + config.mq_former.grounding_queries
    captions = min(1.0, settings.caption_steps / settings.steps)
    kinds = [(s.caption_prompt, s.caption + 1, captions), (s.prompt, s.answer, 1 - captions)]
    kinds = [kind for kind in kinds if kind[2] > 0]

    def loss(kind: int) -> Tensor:
        prompt, answer, _ = kinds[kind]
        sequence = prompt + answer
        causal_SS = torch.ones(sequence, sequence, dtype=torch.bool).tril()
        places_BS1 = (torch.arange(sequence) < queries).expand(s.batch, -1).unsqueeze(-1)
        with numerics.autocast(CPU, settings.precision):
            memory = mq_former.look(image_BPD, local)
            query_BQD = mq_former("instruction", memory, *_text(s.batch, s.instruction), wanted="queries")[0]
            embedded_BSE = base.get_input_embeddings()(torch.zeros(s.batch, sequence, dtype=torch.long))
            tokens_BQE = projection(query_BQD).to(embedded_BSE.dtype)
            inputs_BSE = embedded_BSE.masked_scatter(places_BS1, tokens_BQE)
            hidden_BSE = base.model(
                inputs_embeds=inputs_BSE, attention_mask=causal_SS.expand(s.batch, 1, -1, -1), use_cache=False
            )[0]
            logits_MV = base.lm_head(hidden_BSE[:, -answer:].flatten(0, 1))
            return F.cross_entropy(logits_MV.float(), torch.zeros(len(logits_MV), dtype=torch.long))

    def lr_of(name: str) -> float:
        return settings.optimizer.lr if name.startswith("mq_former.") else settings.lora_lr

    optimizers = _optimizers(module, settings.optimizer, lr_of)
    return Trainee(module, optimizers, loss, tuple(share for *_, share in kinds), settings.optimizer.grad_clip)


def _optimizers(module: nn.Module, settings: Optimizer, lr_of: Callable[[str], float]) -> list[torch.optim.Optimizer]:
    return optimizer.build(
        module,
        algorithm=settings.algorithm,
        lr_of=lr_of,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )


def _text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.ones(batch, length, dtype=torch.long), torch.ones(batch, length, dtype=torch.bool)


def _seen(mq_former: MQFormer, s: Shapes) -> tuple[Tensor, LocalFeatures]:
    sizes = mq_former.config
    local = LocalFeatures(
        detector_BND=torch.randn(s.batch, s.objects, sizes.detector_width),
        segmenter_BND=torch.randn(s.batch, s.objects, sizes.segmenter_width),
        tag_ids_BNK=torch.ones(s.batch, s.objects, s.tag_tokens, dtype=torch.long),
        boxes_BN4=torch.rand(s.batch, s.objects, 4),
        object_mask_BN=torch.ones(s.batch, s.objects, dtype=torch.bool),
    )
    return torch.randn(s.batch, s.patches, sizes.image_width), local
