"""What a training stage holds on a device, and how much of it each strategy divides among devices."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lyrics.config import Config
from lyrics.plan import costs, parts, steps
from lyrics.plan.hardware import GIB, Assumptions, Hardware

STAGES = {"pretrain": "stage1", "finetune": "stage2"}
_UNSHARDED = 2  # FSDP2 computes with one whole block while it gathers the next
_BUCKETS = 2  # DDP exchanges gradients in copies of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """A stage in micro-batches of `batch` samples on each of `ranks` devices, `accumulate` of them in a step.

    Bytes, but for operations: those of a micro-batch by kind of step, with the share of such steps, and those of the
    optimizer. `unsharded` is what FSDP2 holds whole beside its share.
    """

    batch: int
    ranks: int
    accumulate: int
    strategy: str
    weights: int
    gradients: int
    optimizer: int
    unsharded: int
    activations_per_sample: float
    micro_batch: list[tuple[float, list[costs.Operation]]]
    optimizer_step: list[costs.Operation]

    @property
    def flops(self) -> float:
        """Of the products of one step on one device."""
        each = sum(share * costs.flops(operations) for share, operations in self.micro_batch)
        return self.accumulate * each + costs.flops(self.optimizer_step)

    def seconds(self, hardware: Hardware) -> float:
        """Of one step, by the roofline of its operations."""
        each = sum(share * costs.seconds(operations, hardware) for share, operations in self.micro_batch)
        return self.accumulate * each + costs.seconds(self.optimizer_step, hardware)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """Bytes on one device under one strategy, `batch` samples at a time."""

    strategy: str
    chosen: bool
    batch: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    runtime: float
    largest_batch: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.runtime


def meter(stage: str, config: Config, assumed: Assumptions, hardware: Hardware) -> StageCost:
    """Run a micro-batch of each kind of step on tensors without data, as one of the devices gets it."""
    settings = getattr(config, stage)
    settings = dataclasses.replace(settings, precision=hardware.precision(settings.precision))
    config = dataclasses.replace(config, **{stage: settings})
    ranks, accumulate = min(settings.processes, hardware.devices), settings.accumulate
    batch = math.ceil(settings.batch_size / (ranks * accumulate))
    built = parts.build(config, assumed)
    with costs.metered(fused_attention=hardware.kind == "cuda") as counted:
        for module in (built.mq_former, built.projection, built.llm):
            parts.without_data(module)
        trainee = steps.take(stage, config, assumed, built, batch, ranks)
        parameters = trainee.trained()
        gradients = _bytes(parameters)
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        activations, micro_batch = _run(trainee, counted)
        counted.forget()
        for one in trainee.optimizers:
            one.step()
        optimizer_step = list(counted.operations)
        state = _bytes(v for one in trainee.optimizers for s in one.state.values() for v in s.values())
        bits = config.stage2.llm_bits
        blocks = [weight_bytes(block.named_parameters(prefix=".layers."), bits) for block in trainee.blocks]
        weights = weight_bytes(trainee.module.named_parameters(), bits)
        return StageCost(
            batch=batch,
            ranks=ranks,
            accumulate=accumulate,
            strategy=settings.strategy,
            weights=weights,
            gradients=gradients,
            optimizer=state,
            unsharded=weights - sum(blocks) + _UNSHARDED * max(blocks) + (gradients if accumulate > 1 else 0),
            activations_per_sample=activations / batch * hardware.allocator_factor,
            micro_batch=micro_batch,
            optimizer_step=optimizer_step,
        )


def _run(trainee: steps.Trainee, counted: costs.Meter) -> tuple[int, list[tuple[float, list[costs.Operation]]]]:
    """Most bytes that come alive in a micro-batch beside gradients, and its operations by kind of step."""
    most, found = 0, []
    for kind, share in enumerate(trainee.shares):
        before = counted.live
        counted.forget()
        trainee.loss(kind).backward()
        most = max(most, counted.peak - before)
        operations = list(counted.operations)
        found.append((share, costs.compiled(operations) if trainee.compile else operations))
    return most, found


def strategies(cost: StageCost, hardware: Hardware) -> list[Use]:
    """One device; and on several, all of it on each (DDP) or everything divided (FSDP2)."""
    ranks = cost.ranks
    held = {"one device": (float(cost.weights), float(cost.gradients), float(cost.optimizer))}
    chosen = "one device"
    if ranks > 1:
        held[f"DDP, {ranks}"] = (cost.weights, _BUCKETS * cost.gradients, cost.optimizer)
        held[f"FSDP2, {ranks}"] = (
            cost.weights / ranks + cost.unsharded, cost.gradients / ranks, cost.optimizer / ranks
        )  # fmt: skip
        chosen = f"{'DDP' if cost.strategy == 'ddp' else 'FSDP2'}, {ranks}"
    runtime = hardware.runtime_gib * GIB
    uses = []
    for name, (weights, gradients, state) in held.items():
        batch = cost.batch * (ranks if name == "one device" else 1)
        left = hardware.memory_gib * GIB - weights - gradients - state - runtime
        uses.append(
            Use(
                strategy=name,
                chosen=name == chosen,
                batch=batch,
                weights=weights,
                gradients=gradients,
                optimizer=state,
                activations=cost.activations_per_sample * batch,
                runtime=runtime,
                largest_batch=max(0, int(left // cost.activations_per_sample)),
            )
        )
    return uses


def weight_bytes(parameters: Iterable[tuple[str, nn.Parameter]], bits: int | None) -> int:
    """Of named parameters; the frozen matrices in the language model's layers have `bits` (8, 4), if given."""
    total = 0.0
    for name, p in parameters:
        quantised = bits in (8, 4) and not p.requires_grad and p.dtype.itemsize == 2 and p.ndim == 2
        total += p.numel() * (bits / 8 if quantised and ".layers." in name else p.element_size())  # type: ignore[operator]
    return int(total)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
