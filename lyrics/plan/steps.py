"""One micro-batch of each stage on tensors of the planned shapes: the modules and losses that the stages use, with
texts of given lengths in place of a tokenizer's. tests/test_plan.py compares its products with the stage's own.

Shapes: B joint batch of the ranks, b pictures of one, R rows, S sequence, T text tokens, N objects, Q queries,
P pairs, M asked tokens, C contrastive width, E language width.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lyrics import numerics, optimizer
from lyrics.config import Config, Stage1, Stage2
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
    """Of a micro-batch: pictures on each of `ranks` devices, how long its longest texts are, rows of the packed."""

    batch: int
    ranks: int
    patches: int
    objects: int
    tag_tokens: int
    caption: int
    spatial: int
    pair: int
    instruction: int
    prompt: int
    caption_prompt: int
    answer: int
    masked: int
    rows: int


def shapes(config: Config, assumed: Assumptions, patches: int, batch: int, ranks: int = 1) -> Shapes:
    """Of a micro-batch of the preset; texts are cut as the stages cut them."""
    limit = config.mq_former.max_text_tokens
    objects = min(assumed.objects, config.refine.max_objects)
    spatial = min(objects * assumed.object_tokens, limit - 2)
    visual, grounding = config.mq_former.visual_queries, config.mq_former.grounding_queries
    beside_objects = config.mq_former.grounding == "per_object" and config.stage2.spatial_text == "llm"
    asked = assumed.prompt_tokens + visual + assumed.instruction_tokens
    read = objects * assumed.object_tokens_llm if config.stage2.spatial_text == "llm" else 0
    return Shapes(
        batch=batch,
        ranks=ranks,
        patches=patches,
        objects=objects,
        tag_tokens=assumed.tag_tokens,
        caption=assumed.caption_tokens,
        spatial=spatial,
        pair=min(assumed.pair_tokens, assumed.caption_tokens + spatial),
        instruction=min(assumed.instruction_tokens + 2 + spatial, limit),
        prompt=asked + (objects if beside_objects else grounding) + read,
        caption_prompt=asked + grounding,
        answer=assumed.answer_tokens,
        masked=max(1, round(spatial * assumed.masked_share)),
        rows=math.ceil(batch * assumed.packed_share) if config.stage2.packing else batch,
    )


@dataclasses.dataclass(frozen=True)
class Trainee:
    """What a stage holds on its device, and how it takes one step.

    Attributes:
        blocks: layers that are compiled, or sharded, one by one.
        loss: of a micro-batch of one kind; steps of some stages differ (`stage1.objectives`, `stage2.first`).
        shares: how many of the steps are of each kind.
    """

    module: nn.Module
    blocks: Sequence[nn.Module]
    loss: Callable[[int], Tensor]
    shares: tuple[float, ...]
    optimizers: Sequence[torch.optim.Optimizer]
    accumulate: int
    compile: bool
    grad_clip: float

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.module.parameters() if p.requires_grad]

    def step(self, kind: int) -> None:
        """As `lyrics.train.loop.fit` does."""
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)
        for _ in range(self.accumulate):
            self.loss(kind).backward()
        nn.utils.clip_grad_norm_(self.trained(), self.grad_clip)
        for one in self.optimizers:
            one.step()


def take(stage: str, config: Config, assumed: Assumptions, parts: Parts, batch: int, ranks: int = 1) -> Trainee:
    """`stage1` or `stage2` in micro-batches of `batch` samples on each of `ranks` devices."""
    s = shapes(config, assumed, parts.encoder.patches, batch, ranks)
    return stage1(config, parts, s) if stage == "stage1" else stage2(config, parts, s)


def stage1(config: Config, parts: Parts, s: Shapes) -> Trainee:
    """`pretrain`, on fresh MQ-Former weights."""
    mq_former, settings = parts.mq_former.train(), config.stage1
    mq_former.activation_checkpointing = settings.activation_checkpointing
    train_only(mq_former, settings.trainable, "stage1.trainable")
    image_bPD, local = _seen(mq_former, s)
    captions, spatials = s.caption + 2, s.spatial + 2
    both = min(s.pair + 3, config.mq_former.max_text_tokens)
    pairs = 3 * s.batch
    same_bB = torch.eye(s.batch, s.batch * s.ranks, dtype=torch.bool)
    matched_P = torch.arange(pairs) < s.batch

    def text(length: int) -> Tensor:
        _, cls_b1D = mq_former("contrastive", None, *_text(s.batch, length), wanted="cls")
        return mq_former.text_projection(cls_b1D)

    def contrastive(features_bXC: Tensor) -> list[Tensor]:
        joint_BXC = torch.cat([features_bXC] * s.ranks)  # what the ranks gather
        found = []
        for queries, place in zip(mq_former.split_queries(features_bXC[:, :-2]), (-2, -1), strict=True):
            joint = mq_former.split_queries(joint_BXC[:, :-2])[place]
            image_to_text_bB = losses.query_text_similarity(queries, joint_BXC[:, place])
            text_to_image_bB = image_to_text_bB.T
            if s.ranks > 1:
                text_to_image_bB = losses.query_text_similarity(joint, features_bXC[:, place]).T
            found.append(
                losses.contrastive_loss(
                    image_to_text_bB, text_to_image_bB, mq_former.temperature, same_bB, settings.label_smoothing
                )
            )
        return found

    def align(memory: Memory, encoded: EncodedQueries) -> list[Tensor]:
        if not settings.itc_cross_query:
            encoded = mq_former.encode_queries(memory, cross_query=False)
        query_bQC = mq_former.image_projection(encoded.query_PQD)
        itc = contrastive(torch.cat([query_bQC, text(captions), text(spatials)], dim=1))
        rows = Memory(memory.layers, memory.pictures, Lanes(torch.arange(pairs), pairs // s.batch))
        query_PQD, _ = mq_former("matching", rows, *_text(pairs, both), wanted="queries")
        return [*itc, losses.matching_loss(mq_former.matching_head(query_PQD).mean(1), matched_P)]

    def generate(memory: Memory, encoded: EncodedQueries) -> list[Tensor]:
        _, text_bTD = mq_former("captioning", memory, *_text(s.batch, captions), encoded=encoded)
        icg = losses.token_loss(
            mq_former.text_logits(text_bTD[:, :-1].flatten(0, 1)), torch.zeros(s.batch * (captions - 1)).long()
        )
        hidden_bN = torch.zeros(s.batch, s.objects, dtype=torch.bool)
        hiding = dataclasses.replace(local, hidden_tag_BN=hidden_bN, hidden_box_BN=hidden_bN)
        again = mq_former.look_again(memory, hiding)
        _, text_bTD = mq_former("masked_spatial", again, *_text(s.batch, spatials), wanted="text")
        asked_MD = text_bTD[:, : s.masked].flatten(0, 1)
        labels_M = torch.zeros(len(asked_MD), dtype=torch.long)
        return [icg, losses.token_loss(mq_former.text_logits(asked_MD), labels_M)]

    kinds = ((align,), (generate,)) if settings.objectives == "alternate" else ((align, generate),)

    def loss(kind: int) -> Tensor:
        with numerics.autocast(CPU, settings.precision):
            memory = mq_former.look(image_bPD, local)
            encoded = mq_former.encode_queries(memory)
            return torch.stack([x for group in kinds[kind] for x in group(memory, encoded)]).sum()

    shares = tuple(1 / len(kinds) for _ in kinds)
    return _trainee(mq_former, list(mq_former.layers), loss, shares, settings, lambda _: settings.optimizer.lr)


def stage2(config: Config, parts: Parts, s: Shapes) -> Trainee:
    """`finetune`: MQ-Former without its heads, projection and adapter."""
    mq_former, projection, llm, settings = parts.mq_former, parts.projection, parts.llm, config.stage2
    module = nn.ModuleDict({"mq_former": mq_former, "projection": projection, "llm": llm}).train()
    train_only(module, settings.trainable, "stage2.trainable")
    base: Any = llm.get_base_model()
    mq_former.activation_checkpointing = settings.activation_checkpointing
    if settings.activation_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
    image_bPD, local = _seen(mq_former, s)
    queries = s.batch * mq_former.config.queries
    # Captions are of like lengths: packing gains nothing.
    captions = min(1.0, settings.first.steps / settings.steps) if "caption" in settings.first.kinds else 0.0
    kinds = [(s.caption_prompt + s.caption + 1, s.batch, captions), (s.prompt + s.answer, s.rows, 1 - captions)]
    kinds = [kind for kind in kinds if kind[-1] > 0]
    asked = s.batch * max(s.answer, s.caption + 1 if captions else 0)

    def loss(kind: int) -> Tensor:
        sequence, rows, _ = kinds[kind]
        inputs: dict[str, Tensor] = {}
        if settings.packing:
            inputs["attention_mask"] = torch.ones(rows, 1, sequence, sequence, dtype=torch.bool).tril()
            inputs["position_ids"] = torch.arange(sequence).expand(rows, -1)
        places_RS1 = (torch.arange(rows * sequence) < queries).view(rows, sequence, 1)
        with numerics.autocast(CPU, settings.precision):
            memory = mq_former.look(image_bPD, local)
            query_bQD = mq_former("instruction", memory, *_text(s.batch, s.instruction), wanted="queries")[0]
            embedded_RSE = base.get_input_embeddings()(torch.zeros(rows, sequence, dtype=torch.long))
            tokens_bQE = projection(query_bQD).to(embedded_RSE.dtype)
            inputs["inputs_embeds"] = embedded_RSE.masked_scatter(places_RS1, tokens_bQE)
            hidden_RSE = base.model(use_cache=False, **inputs)[0]
            logits_MV = base.lm_head(hidden_RSE[:, :-1].flatten(0, 1)[:asked])
            return F.cross_entropy(logits_MV.float(), torch.zeros(len(logits_MV), dtype=torch.long))

    def lr_of(name: str) -> float:
        return settings.optimizer.lr if name.startswith("mq_former.") else settings.lora_lr

    blocks = [*mq_former.layers, *base.model.layers]
    return _trainee(module, blocks, loss, tuple(share for *_, share in kinds), settings, lr_of)


def _trainee(
    module: nn.Module,
    blocks: list[nn.Module],
    loss: Callable[[int], Tensor],
    shares: tuple[float, ...],
    settings: Stage1 | Stage2,
    lr_of: Callable[[str], float],
) -> Trainee:
    optimizers = optimizer.build(
        module,
        algorithm=settings.optimizer.algorithm,
        lr_of=lr_of,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )
    return Trainee(
        module,
        blocks,
        loss,
        shares,
        optimizers,
        accumulate=settings.accumulate,
        compile=settings.compile,
        grad_clip=settings.optimizer.grad_clip,
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
