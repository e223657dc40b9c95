"""What the fits share: the held-out scenes, a deterministic setting, and one short training loop."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lyrics import numerics, optimizer
from lyrics.errors import InputError
from lyrics.seeding import stable_seed
from lyrics.stage import Tracker

LOG_EVERY = 10
_HELD_OUT = 100
_WARMUP_SHARE = 0.06
_GRAD_CLIP = 1.0

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def hold_out(items: Sequence[T], most: int = _HELD_OUT) -> tuple[list[T], list[T]]:
    """Training and held-out items: the last `most` (a tenth where ten times as many are not there) are held out.

    Every part holds out the same scenes, so that none is scored on what another was fitted on.
    """
    held = min(most, math.ceil(len(items) / 10))
    if len(items) <= held:
        raise InputError(f"The foundation split has {len(items)} records; a part fitted on it needs at least 2")
    return list(items[:-held]), list(items[-held:])


@contextlib.contextmanager
def deterministic(seed: int, part: str) -> Iterator[None]:
    """Seed torch for `part` and allow deterministic kernels only; the setting before is restored."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(stable_seed(seed, "foundation", part))
    numerics.use_deterministic_kernels()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train(
    modules: nn.Module,
    *,
    part: str,
    steps: int,
    lr: float,
    losses_at: Callable[[int], dict[str, Tensor]],
    device: torch.device,
    tracker: Tracker,
    weight_decay: float = 0.05,
    precision: numerics.Precision = "auto",
) -> None:
    """Muon with warm-up and a cosine to zero on the sum of the losses, logged as `foundation/PART_NAME`.

    Raises:
        FloatingPointError: a loss or gradient is not finite; the step was not taken.
    """
    parameters = [p for p in modules.parameters() if p.requires_grad]
    optimizers = optimizer.build(
        modules, algorithm="muon", lr_of=lambda _: lr, betas=(0.9, 0.98), weight_decay=weight_decay
    )
    warmup = max(1, round(_WARMUP_SHARE * steps))
    modules.train()
    for step in tqdm(range(steps), desc=f"fit {part}", unit="step", mininterval=1.0):
        factor = min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        )
        optimizer.scale_lr(optimizers, factor)
        with numerics.autocast(device, precision):
            losses = losses_at(step)
        torch.stack(list(losses.values())).sum().backward()
        norm = nn.utils.clip_grad_norm_(parameters, _GRAD_CLIP)
        if not math.isfinite(float(norm)):
            raise FloatingPointError(f"foundation {part}: the gradient is not finite at step {step}; lower its lr")
        for one in optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0 or step == steps - 1:
            tracker.log_metrics({f"foundation/{part}_{k}": v.item() for k, v in losses.items()}, step=step)
    modules.eval()


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
