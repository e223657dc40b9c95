"""Stage 1, representation alignment: MQ-Former learns from frozen encoder and refiner (paper section 3)."""

import dataclasses
import logging
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lyrics import io, numerics, optimizer
from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.foundation.tokenizer import bert_state, load_text_tokenizer
from lyrics.model.inputs import TextTokenizer
from lyrics.model.mq_former import Memory, MQFormer, MQFormerConfig
from lyrics.model.mq_former_weights import load_bert
from lyrics.refiner.features import RefinedSplit
from lyrics.stage import Tracker
from lyrics.train import loop, losses
from lyrics.train.stage1_batches import Stage1Batch, Stage1Data

FOUNDATION, REFINED, STAGE1 = Path("models/foundation"), Path("data/refined"), Path("models/stage1")
TRAIN_SPLITS = ("web", "instruct")
log = logging.getLogger(__name__)


class Objectives(nn.Module):
    """ITC, ITM, ICG and MSP on one batch."""

    def __init__(self, mq_former: MQFormer, tokenizer: TextTokenizer, *, itc_cross_query: bool, smoothing: float):
        super().__init__()
        self.mq_former, self.tokenizer = mq_former, tokenizer
        self.itc_cross_query, self.smoothing = itc_cross_query, smoothing

    @property
    def temperature(self) -> Tensor:
        return self.mq_former.temperature.clamp(0.001, 0.5)

    def align(self, batch: Stage1Batch, memory: Memory) -> dict[str, Tensor]:
        """ITC of both kinds of query, and ITM on negatives drawn by their similarity."""
        caption_BB, spatial_BB = self.similarities(batch, memory)
        return {
            "itc_loss": losses.contrastive_loss(
                caption_BB, self.temperature, self._to(batch.same_caption_BB), self.smoothing
            ),
            "itc_spatial_loss": losses.contrastive_loss(
                spatial_BB, self.temperature, self._to(batch.same_spatial_BB), self.smoothing
            ),
            "itm_loss": self.matching(batch, memory, caption_BB.detach()),
        }

    def similarities(self, batch: Stage1Batch, memory: Memory) -> tuple[Tensor, Tensor]:
        """Visual queries × captions, grounding queries × spatial representations."""
        query_BQD, _ = self.mq_former("contrastive", memory, cross_query=self.itc_cross_query)
        query_BQC = self.mq_former.image_projection(query_BQD)
        visual_BVC, grounding_BGC = self.mq_former.split_queries(query_BQC)
        return (
            losses.query_text_similarity(visual_BVC, self.encode_text(batch.caption_rows)),
            losses.query_text_similarity(grounding_BGC, self.encode_text(batch.spatial_rows)),
        )

    def encode_text(self, rows: list[list[int]]) -> Tensor:
        """text_BC: projected [CLS] of each text."""
        t = self.tokenizer
        ids_BT, mask_BT = map(self._to, t.pad_rows([[t.cls, *row, t.sep] for row in rows]))
        _, text_BTD = self.mq_former("contrastive", None, ids_BT, mask_BT)
        return self.mq_former.text_projection(text_BTD[:, 0])

    def matching(self, batch: Stage1Batch, memory: Memory, caption_BB: Tensor) -> Tensor:
        """Each pair, its picture with a hard negative caption, its caption with a hard negative picture."""
        logits_B2, matched_B = self.matching_logits(batch, memory, caption_BB)
        return losses.matching_loss(logits_B2, matched_B)

    def matching_logits(self, batch: Stage1Batch, memory: Memory, caption_BB: Tensor) -> tuple[Tensor, Tensor]:
        same_BB, uniform_B2 = self._to(batch.same_caption_BB), self._to(batch.uniform_B2)
        text_of_image = losses.hard_negatives(caption_BB, self.temperature, same_BB, uniform_B2[:, 0])
        image_of_text = losses.hard_negatives(caption_BB.T, self.temperature, same_BB.T, uniform_B2[:, 1])
        rows_B = torch.arange(len(same_BB), device=same_BB.device)
        with_text, with_image = rows_B[text_of_image >= 0], rows_B[image_of_text >= 0]
        pictures = torch.cat([rows_B, with_text, image_of_text[with_image]])
        captions = torch.cat([rows_B, text_of_image[with_text], with_image])
        t = self.tokenizer
        limit = self.mq_former.config.max_text_tokens
        texts = [
            [t.cls, *batch.caption_rows[c], t.sep, *batch.spatial_rows[p]][: limit - 1] + [t.sep]
            for p, c in zip(pictures.tolist(), captions.tolist(), strict=True)
        ]
        ids_BT, mask_BT = map(self._to, t.pad_rows(texts))
        query_BQD, _ = self.mq_former("matching", memory.index(pictures), ids_BT, mask_BT)
        return self.mq_former.matching_head(query_BQD).mean(1), pictures == captions

    def captioning(self, batch: Stage1Batch, memory: Memory) -> Tensor:
        """ICG: the caption from left to right, from the queries."""
        t = self.tokenizer
        ids_BT, mask_BT = map(self._to, t.pad_rows([[t.dec, *row, t.sep] for row in batch.caption_rows]))
        _, text_BTD = self.mq_former("captioning", memory, ids_BT, mask_BT)
        labels_BT = ids_BT.masked_fill(~mask_BT, losses.IGNORED)
        return losses.causal_token_loss(self.mq_former.text_logits(text_BTD), labels_BT)

    def masked_spatial_logits(self, batch: Stage1Batch) -> tuple[Tensor, Tensor]:
        """Logits (M, vocabulary) and labels (M) of the M hidden tokens. The local tokens hide what is asked for."""
        visual = batch.visual.to(self._device)
        local = dataclasses.replace(
            visual.local, hidden_tag_BN=self._to(batch.hidden_tag_BN), hidden_box_BN=self._to(batch.hidden_box_BN)
        )
        memory = self.mq_former.look(visual.image_tokens_BPD, local)
        t, limit = self.tokenizer, self.mq_former.config.max_text_tokens
        ids_BT, mask_BT = map(self._to, t.pad_rows([[t.cls, *row][: limit - 1] + [t.sep] for row in batch.msp_rows]))
        labels = torch.full_like(ids_BT, losses.IGNORED, device="cpu")
        for row, values in enumerate(batch.msp_labels):
            kept = values[: limit - 2]
            labels[row, 1 : 1 + len(kept)] = torch.tensor(kept)
        _, text_BTD = self.mq_former("masked_spatial", memory, ids_BT, mask_BT)
        labels_BT = self._to(labels)
        asked_BT = labels_BT != losses.IGNORED
        return self.mq_former.text_logits(text_BTD[asked_BT]), labels_BT[asked_BT]

    def masked_spatial(self, batch: Stage1Batch) -> Tensor:
        """MSP: hidden tags and boxes of the spatial representation; 0 for a batch without objects."""
        logits_MV, labels_M = self.masked_spatial_logits(batch)
        if not len(labels_M):
            return logits_MV.sum() * 0.0
        return nn.functional.cross_entropy(logits_MV.float(), labels_M)

    def look(self, batch: Stage1Batch) -> Memory:
        visual = batch.visual.to(self._device)
        return self.mq_former.look(visual.image_tokens_BPD, visual.local)

    def forward(self, batch: Stage1Batch, groups: tuple[str, ...]) -> dict[str, Tensor]:
        """Losses of the groups asked for: `align` (ITC, ITM) and `generate` (ICG, MSP)."""
        memory = self.look(batch)
        found: dict[str, Tensor] = {}
        if "align" in groups:
            found |= self.align(batch, memory)
        if "generate" in groups:
            found |= {"icg_loss": self.captioning(batch, memory), "msp_loss": self.masked_spatial(batch)}
        return found

    @property
    def _device(self) -> torch.device:
        return self.mq_former.temperature.device

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


def mq_former_config(config: Config, tokenizer: TextTokenizer, widths: dict[str, int]) -> MQFormerConfig:
    """Sizes from params/, the tokenizer and what `refine` measured (`data/refined/summary.json`)."""
    return MQFormerConfig(
        **dataclasses.asdict(config.mq_former),
        vocabulary_size=len(tokenizer.tokenizer),
        pad_token_id=tokenizer.pad,
        image_width=widths["image_width"],
        detector_width=widths["detector_width"],
        segmenter_width=widths["segmenter_width"],
        max_objects=config.refine.max_objects,
        temperature=config.stage1.temperature,
    )


def new_mq_former(config: Config, tokenizer: TextTokenizer) -> MQFormer:
    """Fresh weights, text side from the foundation's BERT where it has one."""
    torch.manual_seed(config.seed)
    mq_former = MQFormer(mq_former_config(config, tokenizer, io.read_json(REFINED / "summary.json")))
    state = bert_state(FOUNDATION / "tokenizer")
    if state is not None:
        log.info("MQ-Former from BERT: %s", load_bert(mq_former, state))
    return mq_former


def save_mq_former(folder: Path, mq_former: MQFormer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in mq_former.state_dict().items()}, folder / "model.safetensors")


def load_mq_former(folder: Path) -> MQFormer:
    """Strictly: every weight of the file has its place and every place its weight."""
    settings = io.read_json(loop.need(folder / "config.json", "pretrain"))["mq_former"]
    mq_former = MQFormer(MQFormerConfig(**settings))
    mq_former.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return mq_former


def open_splits(names: tuple[str, ...]) -> list[RefinedSplit]:
    loop.need(REFINED / "summary.json", "refine")
    return [RefinedSplit(REFINED / name) for name in names if (REFINED / name).is_dir()]


def run(config: Config, work: Path, tracker: Tracker) -> None:
    """The `pretrain` verb: writes model.safetensors, config.json, history.jsonl and quality.json."""
    from lyrics.train.stage1_quality import measure

    settings = config.stage1
    device = loop.pick_device(config.device)
    numerics.use_deterministic_kernels()
    tokenizer = TextTokenizer(load_text_tokenizer(FOUNDATION / "tokenizer"))
    data = Stage1Data(
        open_splits(TRAIN_SPLITS),
        tokenizer,
        coordinate_format=config.refine.coordinate_format,
        mask_probability=settings.mask_probability,
        seed=config.seed,
    )
    if len(data) < 2:
        raise InputError(f"Stage 1 needs at least 2 pictures with captions in {REFINED}, found {len(data)}")
    batch_size = min(settings.batch_size, len(data))
    mq_former = new_mq_former(config, tokenizer).to(device).train()
    objectives = Objectives(
        mq_former, tokenizer, itc_cross_query=settings.itc_cross_query, smoothing=settings.label_smoothing
    )
    trainable = {k: p for k, p in mq_former.named_parameters() if p.requires_grad}
    optimizers = optimizer.build(
        mq_former,
        algorithm=settings.optimizer.algorithm,
        lr_of=lambda _: settings.optimizer.lr,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )

    def losses_at(step: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        batch = data.batch(loop.batches(config.seed, len(data), batch_size, step), step)
        groups: tuple[str, ...] = ("align", "generate")
        if settings.objectives == "alternate":
            groups = (groups[step % 2],)
        with numerics.autocast(device, settings.precision):
            return objectives(batch, groups), batch.ids

    history = loop.fit(
        name="stage1",
        seed=config.seed,
        steps=settings.steps,
        trainable=trainable,
        optimizers=optimizers,
        warmup_steps=settings.optimizer.warmup_steps,
        grad_clip=settings.optimizer.grad_clip,
        losses_at=losses_at,
        work=work,
        checkpoint_every=settings.checkpoint_every,
        log_every=settings.log_every,
        samples_per_step=batch_size,
        tracker=tracker,
    )
    out = work / "out"
    save_mq_former(out, mq_former)
    loop.write_history(out / "history.jsonl", history)
    io.write_json(
        out / "config.json",
        {
            "mq_former": dataclasses.asdict(mq_former.config),
            "chance": {
                "stage1/itc_loss": math.log(batch_size),
                "stage1/itc_spatial_loss": math.log(batch_size),
                "stage1/itm_loss": losses.MATCHING_CHANCE,
                "stage1/icg_loss": math.log(mq_former.config.vocabulary_size),
                "stage1/msp_loss": math.log(mq_former.config.vocabulary_size),
            },
            "floor": {"stage1/itc_loss": losses.contrastive_floor(batch_size, settings.label_smoothing)},
        },
    )
    quality = measure(objectives.eval(), config, tokenizer)
    io.write_json(out / "quality.json", quality)
    tracker.log_metrics({f"stage1/{key}": value for key, value in quality.items()})
