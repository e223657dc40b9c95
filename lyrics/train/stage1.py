"""Stage 1, representation alignment: MQ-Former learns from frozen encoder and refiner (paper section 3)."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lyrics import io, numerics, optimizer
from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.foundation.tokenizer import bert_state, load_text_tokenizer
from lyrics.model.inputs import TextTokenizer
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.refiner.features import RefinedSplit, see
from lyrics.refiner.online import looker
from lyrics.stage import Tracker
from lyrics.train import devices, loop, losses
from lyrics.train.devices import ALONE, Ranks
from lyrics.train.loop import MicroBatch
from lyrics.train.objectives import GROUPS, Objectives
from lyrics.train.stage1_batches import Stage1Batch, Stage1Data
from lyrics.train.trainable import train_only

FOUNDATION, REFINED, STAGE1 = Path("models/foundation"), Path("data/refined"), Path("models/stage1")
TRAIN_SPLITS = ("web", "instruct")
Levels = dict[str, dict[str, float]]  # "chance" and "floor", of each loss
log = logging.getLogger(__name__)


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
    sizes = mq_former_config(config, tokenizer, io.read_json(REFINED / "summary.json"))
    state = bert_state(FOUNDATION / "tokenizer")
    return MQFormer(sizes) if state is None else MQFormer.from_bert(state, sizes)


def save_mq_former(folder: Path, mq_former: MQFormer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in mq_former.state_dict().items()}, folder / "model.safetensors")


def load_mq_former(folder: Path) -> MQFormer:
    """Strictly: every weight of the file has its place and every place its weight."""
    settings = io.read_json(loop.need(folder / "config.json", "pretrain"))["mq_former"]
    mq_former = MQFormer(MQFormerConfig(**settings))
    mq_former.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return mq_former


def open_splits(
    names: tuple[str, ...], config: Config, device: torch.device, ranks: Ranks = ALONE
) -> list[RefinedSplit]:
    """Those of the splits that there are; each rank checks its share of their features.

    Raises:
        InputError: a file is missing or damaged.
    """
    loop.need(REFINED / "summary.json", "refine")
    look = looker(FOUNDATION / "clip", config.refine, device)
    there = [REFINED / name for name in names if (REFINED / name).is_dir()]
    splits = [RefinedSplit(folder, look, verify=False) for folder in there]
    for split in splits:
        split.verify(slice(ranks.rank, None, ranks.size))
    return splits


def run(config: Config, work: Path, tracker: Tracker) -> None:
    """The `pretrain` verb: writes model.safetensors, config.json, history.jsonl and quality.json."""
    device = devices.pick_device(config.device)
    numerics.use_deterministic_kernels()
    with devices.joined(device) as ranks:
        mq_former, history, levels = train(config, work, tracker, ranks, device)
        if ranks.first:
            _save(work / "out", mq_former, config, history, levels, tracker)


def train(
    config: Config, work: Path, tracker: Tracker, ranks: Ranks, device: torch.device
) -> tuple[MQFormer, list[dict[str, float]], Levels]:
    """The trained MQ-Former, whole on every rank, the history of its losses, and their chance and floor."""
    settings = config.stage1
    tokenizer = TextTokenizer(load_text_tokenizer(FOUNDATION / "tokenizer"))
    data = stage1_data(config, tokenizer, open_splits(TRAIN_SPLITS, config, device, ranks))
    if len(data) < 2:
        raise InputError(
            f"Stage 1 needs at least 2 pictures with captions in {REFINED}, found {len(data)}; give the source more, "
            "or see data/clean and data/raw/rejected.parquet for why they were dropped"
        )
    batch_size = min(settings.batch_size, len(data)) if ranks.size * settings.accumulate == 1 else settings.batch_size
    ranks.check(batch_size, settings.accumulate, "stage1")
    mq_former = new_mq_former(config, tokenizer).to(device).train()
    mq_former.activation_checkpointing = settings.activation_checkpointing
    if settings.compile:
        mq_former.compile_layers()
    objectives = Objectives(
        mq_former, tokenizer, itc_cross_query=settings.itc_cross_query, smoothing=settings.label_smoothing, ranks=ranks
    )
    train_only(mq_former, settings.trainable, "stage1.trainable")
    levels = _levels(batch_size // settings.accumulate, settings.label_smoothing, mq_former.config.vocabulary_size)
    if ranks.first:
        log.info("chance: %s; floor: %s", *({k: round(v, 4) for k, v in level.items()} for level in levels.values()))
        tracker.log_params(levels)
    model = devices.prepare(objectives, list(mq_former.layers), ranks, settings.strategy, device)
    optimizers = optimizer.build(
        mq_former,
        algorithm=settings.optimizer.algorithm,
        lr_of=lambda _: settings.optimizer.lr,
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )
    for one in optimizers:
        one.register_step_post_hook(objectives.bound_temperature)

    def losses_at(step: int) -> Iterator[MicroBatch]:
        groups = GROUPS if settings.objectives == "all" else (GROUPS[step % 2],)
        parts = np.split(loop.batches(config.seed, len(data), batch_size, step), settings.accumulate)
        own = ranks.own(len(parts[0]))
        batches = [data.batch(part, step, own) for part in parts]
        totals = {name: sum(batch.totals[name] for batch in batches) for name in batches[0].totals}
        for batch in batches:

            def losses_of(batch: Stage1Batch = batch) -> dict[str, Tensor]:
                with numerics.autocast(device, settings.precision):
                    return model(batch, groups, totals)

            yield MicroBatch(losses_of, batch.ids, last=batch is batches[-1])

    def not_finite_at(step: int) -> list[str]:
        pairs = [data.pairs[i] for i in loop.batches(config.seed, len(data), batch_size, step)]
        return [image_id for (_, image_id), seen in zip(pairs, see(pairs), strict=True) if not seen.is_finite()]

    history = loop.fit(
        name="stage1",
        seed=config.seed,
        steps=settings.steps,
        model=model,
        trainable={k: p for k, p in mq_former.named_parameters() if p.requires_grad},
        optimizers=optimizers,
        warmup_steps=settings.optimizer.warmup_steps,
        grad_clip=settings.optimizer.grad_clip,
        losses_at=losses_at,
        not_finite_at=not_finite_at,
        work=work,
        checkpoint_every=settings.checkpoint_every,
        checkpoints_kept=settings.checkpoints_kept,
        log_every=settings.log_every,
        samples_per_step=batch_size,
        tracker=tracker,
        ranks=ranks,
    )
    state = devices.whole(mq_former.state_dict())
    trained = MQFormer(mq_former.config).to(device)
    trained.load_state_dict(state)
    return trained, history, levels


def stage1_data(config: Config, tokenizer: TextTokenizer, splits: Sequence[RefinedSplit]) -> Stage1Data:
    return Stage1Data(
        splits,
        tokenizer,
        coordinate_format=config.refine.coordinate_format,
        mask_probability=config.stage1.mask_probability,
        max_text_tokens=config.mq_former.max_text_tokens,
        seed=config.seed,
    )


def _levels(pairs: int, smoothing: float, vocabulary_size: int) -> Levels:
    """What each loss is where nothing was learned, and what is left of it where everything was.

    Args:
        pairs: that ITC sees at once.
    """
    itc = ("stage1/itc_loss", "stage1/itc_spatial_loss")
    return {
        "chance": {
            **dict.fromkeys(itc, math.log(pairs)),
            "stage1/itm_loss": losses.MATCHING_CHANCE,
            **dict.fromkeys(("stage1/icg_loss", "stage1/msp_loss"), math.log(vocabulary_size)),
        },
        "floor": dict.fromkeys(itc, losses.contrastive_floor(pairs, smoothing)),
    }


def _save(
    out: Path,
    mq_former: MQFormer,
    config: Config,
    history: list[dict[str, float]],
    levels: Levels,
    tracker: Tracker,
) -> None:
    from lyrics.train.stage1_quality import measure

    save_mq_former(out, mq_former)
    loop.write_history(out / "history.jsonl", history)
    io.write_json(out / "config.json", {"mq_former": dataclasses.asdict(mq_former.config), **levels})
    tokenizer = TextTokenizer(load_text_tokenizer(FOUNDATION / "tokenizer"))
    objectives = Objectives(
        mq_former,
        tokenizer,
        itc_cross_query=config.stage1.itc_cross_query,
        smoothing=config.stage1.label_smoothing,
    )
    quality = measure(objectives.eval(), config, tokenizer)
    io.write_json(out / "quality.json", quality)
    tracker.log_metrics({f"stage1/{key}": value for key, value in quality.items()})
