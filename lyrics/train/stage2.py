"""Stage 2, instruction tuning: MQ-Former, projection and LoRA learn to answer; the language model stays frozen."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lyrics import io, numerics, optimizer
from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.foundation.llm import load_llm
from lyrics.foundation.tokenizer import load_text_tokenizer
from lyrics.model.inputs import TextTokenizer
from lyrics.model.language import PromptTemplate, adapter_state, add_lora, load_adapter, save_adapter
from lyrics.model.lyrics import LyricsModel
from lyrics.model.mq_former import MQFormer, MQFormerConfig
from lyrics.model.projection import Projection
from lyrics.stage import Tracker
from lyrics.train import devices, loop
from lyrics.train.devices import Ranks
from lyrics.train.loop import MicroBatch
from lyrics.train.projection_start import start_projection
from lyrics.train.stage1 import FOUNDATION, STAGE1, load_mq_former, open_splits
from lyrics.train.stage2_batches import First, Stage2Batch, Stage2Data, without_target
from lyrics.train.trainable import train_only

TRAIN_SPLIT = "instruct"
log = logging.getLogger(__name__)


def build(config: Config) -> LyricsModel:
    """Stage 1's MQ-Former, a new projection, the frozen language model with a new adapter."""
    llm, tokenizer = load_llm(FOUNDATION / "llm", bits=config.stage2.llm_bits)
    if config.stage2.activation_checkpointing:
        llm.activation_checkpointing_enable({"use_reentrant": False})
    mq_former = load_mq_former(STAGE1)
    words: Any = llm.get_input_embeddings()
    torch.manual_seed(config.seed)
    model = LyricsModel(
        mq_former,
        Projection(mq_former.config.hidden_size, llm.config.hidden_size, float(words.weight.detach().float().std())),
        add_lora(llm, **dataclasses.asdict(config.stage2.lora)),
        text_tokenizer=TextTokenizer(load_text_tokenizer(FOUNDATION / "tokenizer")),
        template=PromptTemplate(tokenizer),
        spatial_text_in_llm=config.stage2.spatial_text == "llm",
        packing=config.stage2.packing,
    )
    train_only(model, config.stage2.trainable, "stage2.trainable")
    return model


def run(config: Config, work: Path, tracker: Tracker) -> None:
    """The `finetune` verb: writes model.safetensors, adapter/, config.json and history.jsonl."""
    device = devices.pick_device(config.device)
    numerics.use_deterministic_kernels()
    with devices.joined(device) as ranks:
        data = _data(config, device, ranks)
        ranks.check(config.stage2.batch_size, config.stage2.accumulate, "stage2")
        model = build(config)
        start_projection(model, data, device)
        _log_counts(model, tracker)
        history = train(model, data, config, work, tracker, ranks, device)
        weights, adapter = _whole_parts(model), devices.whole(adapter_state(model.llm))
        if ranks.first:
            _save(work / "out", model, weights, adapter, config, history)


def _data(config: Config, device: torch.device, ranks: Ranks) -> Stage2Data:
    """
    Raises:
        InputError: there are no samples, or some have nothing to learn from.
    """
    splits = open_splits((TRAIN_SPLIT,), config, device, ranks)
    if not splits or not splits[0].samples:
        raise InputError(f"Stage 2 found no samples in data/refined/{TRAIN_SPLIT}; give the source an instruct split")
    if missing := without_target(splits[0].samples):
        raise InputError(
            f"{len(missing)} samples have no target to learn from, the first is {missing[0]}; give them answers or "
            "take them out, and run: make run"
        )
    settings = config.stage2
    data = Stage2Data(
        splits[0],
        coordinate_format=config.refine.coordinate_format,
        shares=settings.shares,
        mix_by=settings.mix_by,
        without_spatial=settings.without_spatial,
        spatial_text_in_llm=settings.spatial_text == "llm",
        first=First(**dataclasses.asdict(settings.first)),
        turns=settings.turns,
        seed=config.seed,
    )
    log.info("stage 2 mixes %s", {name: round(share, 3) for name, share in data.later.weights.items()})
    return data


def train(
    model: LyricsModel,
    data: Stage2Data,
    config: Config,
    work: Path,
    tracker: Tracker,
    ranks: Ranks,
    device: torch.device,
) -> list[dict[str, float]]:
    """Train `model` in place; returns the history of its loss."""
    settings = config.stage2
    model.mq_former.activation_checkpointing = settings.activation_checkpointing
    blocks = [*model.mq_former.layers, *model.language_layers]
    if settings.compile:
        for block in blocks:
            block.compile(dynamic=True)
    wrapped = devices.prepare(model, blocks, ranks, settings.strategy, device).train()
    rates = {"mq_former": settings.optimizer.lr, "projection": settings.projection_lr, "llm": settings.lora_lr}
    optimizers = optimizer.build(
        model,
        algorithm=settings.optimizer.algorithm,
        lr_of=lambda name: rates[name.split(".")[0]],
        betas=settings.optimizer.betas,
        weight_decay=settings.optimizer.weight_decay,
    )

    def losses_at(step: int) -> Iterator[MicroBatch]:
        batch = data.batch(step, settings.batch_size)
        total = model.normaliser(batch.answers, settings.loss_average)
        size = settings.batch_size // settings.accumulate
        own = ranks.own(size)
        for start in range(0, settings.batch_size, size):
            part = batch.part(slice(start + own.start, start + own.stop))

            def losses(part: Stage2Batch = part) -> dict[str, Tensor]:
                seen = part.seen
                with numerics.autocast(device, settings.precision):
                    loss = wrapped(
                        part.instructions,
                        seen,
                        part.answers,
                        part.spatial_texts,
                        settings.loss_average,
                        total=total,
                    )
                return {"lm_loss": loss}

            yield MicroBatch(losses, part.ids, last=start + size == settings.batch_size)

    return loop.fit(
        name="stage2",
        seed=config.seed,
        steps=settings.steps,
        model=wrapped,
        trainable={name: p for name, p in model.named_parameters() if p.requires_grad},
        optimizers=optimizers,
        warmup_steps=settings.optimizer.warmup_steps,
        grad_clip=settings.optimizer.grad_clip,
        losses_at=losses_at,
        not_finite_at=lambda step: data.batch(step, settings.batch_size).not_finite(),
        work=work,
        checkpoint_every=settings.checkpoint_every,
        checkpoints_kept=settings.checkpoints_kept,
        log_every=settings.log_every,
        samples_per_step=settings.batch_size,
        tracker=tracker,
        ranks=ranks,
    )


def _log_counts(model: LyricsModel, tracker: Tracker) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    log.info("stage 2 trains %s parameters, %s are frozen", f"{trained:,}", f"{frozen:,}")
    tracker.log_params({"stage2/trained_parameters": trained, "stage2/frozen_parameters": frozen})


def _whole_parts(model: LyricsModel) -> dict[str, Tensor]:
    """Whole weights of MQ-Former and projection. All ranks call it."""
    parts = {"mq_former": model.mq_former, "projection": model.projection}
    return devices.whole({f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()})


def _save(
    out: Path,
    model: LyricsModel,
    weights: dict[str, Tensor],
    adapter: dict[str, Tensor],
    config: Config,
    history: list[dict[str, float]],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in weights.items()}, out / "model.safetensors")
    save_adapter(out / "adapter", model.llm, adapter)
    loop.write_history(out / "history.jsonl", history)
    parts = sorted(p.parent.name for p in FOUNDATION.glob("*/manifest.json"))
    io.write_json(
        out / "config.json",
        {
            "mq_former": dataclasses.asdict(model.mq_former.config),
            "refine": dataclasses.asdict(config.refine),
            "foundation": dataclasses.asdict(config.foundation),
            "stage2": dataclasses.asdict(config.stage2),
            "frozen_parts": {p: io.sha256_file(FOUNDATION / p / "manifest.json") for p in parts},
            "chance": {"stage2/lm_loss": math.log(len(model.template.tokenizer))},
        },
    )


def load(stage2: Path, foundation: Path) -> LyricsModel:
    """A trained model, in evaluation mode, from its folder and the frozen parts.

    The language model is read in bf16 where stage 2 held it in 16 bits or fewer, else in fp32.

    Raises:
        InputError: a frozen part is not the one the model was trained with.
    """
    settings = io.read_json(loop.need(stage2 / "config.json", "finetune"))
    for part, expected in settings["frozen_parts"].items():
        found = io.sha256_file(loop.need(foundation / part / "manifest.json", f"foundation {part}"))
        if found != expected:
            raise InputError(
                f"{foundation / part} is not the part that {stage2} was trained with (manifest {found[:12]}, expected "
                f"{expected[:12]}); run: dvc repro"
            )
    llm, tokenizer = load_llm(foundation / "llm", bits=16 if settings["stage2"]["llm_bits"] else None)
    mq_former = MQFormer(MQFormerConfig(**settings["mq_former"]))
    model = LyricsModel(
        mq_former,
        Projection(mq_former.config.hidden_size, llm.config.hidden_size),
        load_adapter(stage2 / "adapter", llm),
        text_tokenizer=TextTokenizer(load_text_tokenizer(foundation / "tokenizer")),
        template=PromptTemplate(tokenizer),
        spatial_text_in_llm=settings["stage2"]["spatial_text"] == "llm",
    )
    state = load_file(stage2 / "model.safetensors")
    for prefix, module in (("mq_former.", model.mq_former), ("projection.", model.projection)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return model.eval()
