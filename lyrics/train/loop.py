"""The training loop of both stages: it sequences steps, checkpoints and logs; the stage computes the losses."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lyrics import optimizer
from lyrics.errors import InputError
from lyrics.seeding import rng, stable_seed
from lyrics.stage import Tracker
from lyrics.train import checkpoint

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def cosine_with_warmup(step: int, *, warmup_steps: int, steps: int) -> float:
    """Factor on the learning rate at `step` (from 0): linear warm-up, then a half cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def batches(seed: int, count: int, batch_size: int, step: int) -> np.ndarray:
    """Indices of the batch at `step`: consecutive slices of one shuffle per epoch, a function of (seed, step) alone."""
    position = step * batch_size + np.arange(batch_size)
    epochs, offsets = np.divmod(position, count)
    orders = {epoch: rng(seed, "epoch", epoch).permutation(count) for epoch in np.unique(epochs)}
    return np.array([orders[epoch][offset] for epoch, offset in zip(epochs, offsets, strict=True)])


def fit(
    *,
    name: str,
    seed: int,
    steps: int,
    trainable: dict[str, nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    warmup_steps: int,
    grad_clip: float,
    losses_at: Callable[[int], tuple[dict[str, Tensor], Sequence[str]]],
    work: Path,
    checkpoint_every: int,
    log_every: int,
    samples_per_step: int,
    tracker: Tracker,
) -> list[dict[str, float]]:
    """Train for `steps` steps, resuming from the newest checkpoint in `work`.

    Args:
        losses_at: losses by name and the sample ids of the batch, as a function of the step alone: every draw inside
            is keyed by (seed, step, sample), so that a resumed run computes what an uninterrupted one would.

    Returns:
        History: one row per `log_every` steps, means since the row before.

    Raises:
        FloatingPointError: a loss or gradient is not finite; nothing was stepped, the last checkpoint stands.
    """
    state = checkpoint.load_newest(work / "checkpoints")
    first, history = 0, []
    if state is not None:
        with torch.no_grad():
            for key, parameter in trainable.items():
                parameter.copy_(state["weights"][key])
        for one, saved in zip(optimizers, state["optimizers"], strict=True):
            one.load_state_dict(saved)
        first, history = state["step"], json.loads(state["history"])
        log.info("%s resumes at step %d of %d", name, first, steps)
    sums: dict[str, list[float]] = json.loads(state["sums"]) if state is not None else {}
    started = time.monotonic()
    for step in tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=2, unit="step"):
        optimizer.scale_lr(optimizers, cosine_with_warmup(step, warmup_steps=warmup_steps, steps=steps))
        torch.manual_seed(stable_seed(seed, name, step))
        losses, ids = losses_at(step)
        total = torch.stack(list(losses.values())).sum()
        for one in optimizers:
            one.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(list(trainable.values()), grad_clip)
        loss_value, norm_value = total.item(), norm.item()
        if not math.isfinite(loss_value + norm_value):
            raise FloatingPointError(
                f"{name} stopped before step {step}: loss {loss_value}, gradient norm {norm_value} on samples "
                f"{', '.join(ids[:8])} …; the last checkpoint is kept. Lower the learning rate or look at them."
            )
        for one in optimizers:
            one.step()
        for key, value in losses.items():
            sums.setdefault(key, []).append(value.item())
        if (step + 1) % log_every == 0 or step + 1 == steps:
            row = {f"{name}/{key}": sum(v) / len(v) for key, v in sorted(sums.items())}
            history.append({"step": step + 1, **row})
            sums = {}
            rate = (step + 1 - first) * samples_per_step / (time.monotonic() - started)
            tracker.log_metrics(
                {**row, f"{name}/lr": optimizers[0].param_groups[0]["lr"], f"{name}/grad_norm": norm_value,
                 f"{name}/samples_per_second": rate}, step=step + 1,
            )  # fmt: skip
        if (step + 1) % checkpoint_every == 0 and step + 1 < steps:
            checkpoint.save(
                work / "checkpoints",
                step + 1,
                {
                    "weights": {key: p.detach().cpu() for key, p in trainable.items()},
                    "optimizers": [one.state_dict() for one in optimizers],
                    "history": json.dumps(history),
                    "sums": json.dumps(sums),
                },
            )
    return history


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in history))


def chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def need(path: Path, verb: str) -> Path:
    """`path`, or an error that names the stage that makes it."""
    if not path.exists():
        raise InputError(f"{path} does not exist; make it with: python -m lyrics {verb} (or: make run)")
    return path
