"""The training loop of both stages: it sequences steps, checkpoints and logs; the stage computes the losses."""

import dataclasses
import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lyrics import optimizer
from lyrics.errors import InputError
from lyrics.seeding import reseed, rng
from lyrics.stage import Tracker
from lyrics.train import checkpoint, devices
from lyrics.train.devices import ALONE, Ranks

log = logging.getLogger(__name__)


def cosine_with_warmup(step: int, *, warmup_steps: int, steps: int) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def batches(seed: int, count: int, batch_size: int, step: int) -> np.ndarray:
    """Indices of the batch at `step`: consecutive slices of one shuffle per epoch, a function of (seed, step) alone."""
    position = step * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(position, count)
    return np.array(
        [_order(seed, epoch, count)[offset] for epoch, offset in zip(epochs.tolist(), offsets, strict=True)]
    )


@functools.lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return rng(seed, "epoch", epoch).permutation(count)


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Part of a step: `losses` computes its share of the joint losses; `ids` are its samples on this rank."""

    losses: Callable[[], dict[str, Tensor]]
    ids: Sequence[str]
    last: bool = True


def fit(
    *,
    name: str,
    seed: int,
    steps: int,
    model: nn.Module,
    trainable: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    warmup_steps: int,
    grad_clip: float,
    losses_at: Callable[[int], Iterable[MicroBatch]],
    not_finite_at: Callable[[int], Sequence[str]],
    work: Path,
    checkpoint_every: int,
    checkpoints_kept: int,
    log_every: int,
    samples_per_step: int,
    tracker: Tracker,
    ranks: Ranks = ALONE,
) -> list[dict[str, float]]:
    """Train for `steps` steps, resuming from the newest checkpoint in `work`.

    Args:
        model: as `devices.prepare` gives it.
        losses_at: the micro-batches of a step, computed as they are asked for. Every draw inside is keyed by
            (seed, step, sample), and the global generators (dropout) are set anew by (seed, step, rank), so that a
            resumed run computes what an uninterrupted one would.
        not_finite_at: the samples of the joint batch whose inputs are not finite; asked once training has to stop.

    Returns:
        History: one row per `log_every` steps, means since the row before.

    Raises:
        FloatingPointError: a loss or gradient is not finite; nothing was stepped, the last checkpoint stands.
    """
    first, history, sums = _resume(work / "checkpoints", trainable, optimizers, ranks)
    if first:
        log.info("%s resumes at step %d of %d", name, first, steps)
    started = time.monotonic()
    progress = tqdm(
        range(first, steps), desc=name, initial=first, total=steps, mininterval=2, unit="step", disable=not ranks.first
    )
    for step in progress:
        optimizer.scale_lr(optimizers, cosine_with_warmup(step, warmup_steps=warmup_steps, steps=steps))
        reseed(seed, name, step, ranks.rank)
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        losses, ids = _accumulate(model, losses_at(step), ranks)
        norm = devices.whole(nn.utils.clip_grad_norm_(list(trainable.values()), grad_clip)).item()
        if not math.isfinite(sum(losses.values()) + norm):
            raise FloatingPointError(
                f"{name} stopped before step {step}, with loss {sum(losses.values())} and gradient norm {norm}: "
                f"{_suspects(ids, not_finite_at(step))}. Nothing was changed; the last checkpoint is kept."
            )
        for one in optimizers:
            one.step()
        for key, value in losses.items():
            sums.setdefault(key, []).append(value)
        if (step + 1) % log_every == 0 or step + 1 == steps:
            row = {f"{name}/{key}": sum(v) / len(v) for key, v in sorted(sums.items())}
            history.append({"step": step + 1, **row})
            sums = {}
            rate = (step + 1 - first) * samples_per_step / (time.monotonic() - started)
            tracker.log_metrics(
                {**row, f"{name}/lr": optimizers[0].param_groups[0]["lr"], f"{name}/grad_norm": norm,
                 f"{name}/samples_per_second": rate}, step=step + 1,
            )  # fmt: skip
        if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
            state = {
                "weights": devices.whole(trainable),
                "optimizers": devices.whole([one.state_dict() for one in optimizers]),
                "history": json.dumps(history),
                "sums": json.dumps(sums),
            }
            if ranks.first:
                checkpoint.save(work / "checkpoints", step + 1, state, kept=checkpoints_kept)
    return history


def _resume(
    folder: Path,
    trainable: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    ranks: Ranks,
) -> tuple[int, list[dict[str, float]], dict[str, list[float]]]:
    """The step to go on with, the history and the losses since its last row."""
    with ranks.first_before_others():  # it clears damaged files away
        state = checkpoint.load_newest(folder)
    if state is None:
        return 0, [], {}
    for key, parameter in trainable.items():
        devices.copy_whole(parameter, state["weights"][key])
    for one, saved in zip(optimizers, state["optimizers"], strict=True):
        devices.load_optimizer(one, saved)
    return state["step"], json.loads(state["history"]), json.loads(state["sums"])


def _accumulate(
    model: nn.Module, micro_batches: Iterable[MicroBatch], ranks: Ranks
) -> tuple[dict[str, float], list[str]]:
    """Gradients of all micro-batches and ranks; returns the joint losses and the ids of this rank's samples."""
    sums: dict[str, Tensor] = {}
    ids: list[str] = []
    for micro in micro_batches:
        with devices.gradients_at_the_end(model, micro.last):
            losses = micro.losses()
            # Data-parallel wrappers average gradients over ranks; the joint loss is the sum.
            (torch.stack(list(losses.values())).sum() * ranks.size).backward()
        for key, value in losses.items():
            sums[key] = sums.get(key, 0.0) + value.detach()
        ids += micro.ids
    joint = ranks.sum(torch.stack(list(sums.values())).float())
    return dict(zip(sums, joint.tolist(), strict=True)), ids


def _suspects(ids: Sequence[str], not_finite: Sequence[str]) -> str:
    if not_finite:
        return f"the features of {', '.join(not_finite)} are not finite; make them again with: python -m lyrics refine"
    return f"all inputs are finite; lower the learning rate, or look at the samples {', '.join(ids)}"


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in history))


def need(path: Path, verb: str) -> Path:
    """`path`, or an error that names the stage that makes it."""
    if not path.exists():
        raise InputError(f"{path} does not exist; make it with: python -m lyrics {verb} (or: make run)")
    return path
