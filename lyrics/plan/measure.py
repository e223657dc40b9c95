"""Unit costs of this machine, measured in seconds: products, memory traffic, the start of an operation; real steps."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

from lyrics.config import Config
from lyrics.errors import InputError
from lyrics.numerics import has_native_bf16
from lyrics.plan.hardware import GIB, Assumptions, Hardware
from lyrics.plan.memory import StageCost

_SIDE, _SLOW_SIDE, _COPIED = 2048, 256, 2**26
_ROUNDS = 5
_MOST_SECONDS = 60.0  # of one step by the roofline, which on a CPU says too much; what is slower is not tried
_TIMEOUT_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """Steps of a stage on random numbers: the median of their times, and the process's most bytes."""

    seconds_per_step: float
    peak_bytes: int


def this_machine(planned: Hardware) -> Hardware:
    """One device of this machine, with rates measured now and what else `planned` says."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    return dataclasses.replace(
        planned,
        kind=device.type,
        devices=1,
        memory_gib=memory / GIB,
        bf16_tflops=_product_tflops(torch.bfloat16, device),
        fp32_tflops=_product_tflops(torch.float32, device),
        bandwidth_gb_s=_bandwidth_gb_s(device),
        microseconds_per_operation=_microseconds(device),
        source="measured now",
    )


def rehearse(stage: str, config: Config, assumed: Assumptions, cost: StageCost, hardware: Hardware) -> Rehearsed | None:
    """A few real steps in a process of its own; None where they would not fit or take too long."""
    free = psutil.virtual_memory().available
    needed = cost.weights + cost.gradients + cost.optimizer + cost.activations_per_sample * cost.batch
    if hardware.kind != "cpu" or needed > 0.7 * free or cost.seconds(hardware) > _MOST_SECONDS:
        return None
    given = json.dumps({"config": dataclasses.asdict(config), "assumed": dataclasses.asdict(assumed)})
    command = [sys.executable, "-m", "lyrics.plan.rehearsal", stage, str(cost.batch)]
    ran = subprocess.run(command, input=given, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"The steps of {stage} could not be measured here ({reason}); plan without --measure")
    return Rehearsed(**json.loads(ran.stdout.splitlines()[-1]))


def _product_tflops(dtype: torch.dtype, device: torch.device) -> float:
    # Without products in bf16 torch takes a loop for them: seconds for what others do in milliseconds.
    side = _SIDE if dtype == torch.float32 or has_native_bf16(device) else _SLOW_SIDE
    left = torch.randn(side, side, device=device).to(dtype)
    return 2 * side**3 / _seconds(lambda: left @ left, device) / 1e12


def _bandwidth_gb_s(device: torch.device) -> float:
    numbers = torch.ones(_COPIED // 4, device=device)
    return 2 * _COPIED / _seconds(lambda: numbers + 1, device) / 1e9


def _microseconds(device: torch.device) -> float:
    one, count = torch.ones(8, device=device, requires_grad=True), 1000

    def many() -> None:
        for _ in range(count):
            one + 1

    return _seconds(many, device) / count * 1e6


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, after one that is not counted."""
    times = []
    for _ in range(1 + _ROUNDS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return sorted(times[1:])[_ROUNDS // 2]
