"""What a training stage holds on a device, and how much of it each strategy divides among devices."""

import dataclasses
import math
from collections.abc import Callable

from torch import Tensor, nn

from lyrics.config import Config
from lyrics.plan import costs, parts, steps
from lyrics.plan.hardware import GIB, Assumptions, Hardware

STAGES = {"pretrain": "stage1", "finetune": "stage2"}
_UNSHARDED = 2  # FSDP2 computes with one whole block while it gathers the next


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """A stage at `batch` samples on one device. Bytes, but for `operations` (of one step, by kind of step)."""

    batch: int
    weights: int
    gradients: int
    optimizer: int
    largest_block: int
    fixed_activations: float
    activations_per_sample: float
    operations: list[tuple[float, list[costs.Operation]]]

    @property
    def flops(self) -> float:
        """Of the products of one step."""
        return sum(share * costs.flops(operations) for share, operations in self.operations)

    def seconds(self, hardware: Hardware) -> float:
        """Of one step, by the roofline of its operations."""
        return sum(share * costs.seconds(operations, hardware) for share, operations in self.operations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Use:
    """Bytes on one device under one strategy."""

    strategy: str
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
    """Run one step of each kind on tensors without data, at the batch that one of the devices gets."""
    settings = getattr(config, stage)
    batch = math.ceil(settings.batch_size / hardware.devices)
    half = max(1, batch // 2)
    built = parts.build(config, assumed)
    with costs.metered(fused_attention=hardware.kind == "cuda") as counted:
        for module in (built.mq_former, built.projection, built.llm):
            parts.without_data(module)
        take: Callable[..., steps.Trainee] = getattr(steps, stage)
        trainee = take(config, built, steps.shapes(config, assumed, built.encoder.patches, batch))
        operations, most = [], 0
        for kind, share in enumerate(trainee.shares):
            before, earlier = counted.live, _bytes(_gradients(trainee.module))
            counted.forget()
            loss = trainee.loss(kind)
            forward = counted.peak - before
            loss.backward()
            del loss
            most = max(most, forward, counted.peak - before + earlier - _bytes(_gradients(trainee.module)))
            operations.append((share, list(counted.operations)))
        counted.forget()
        before = counted.live
        for one in trainee.optimizers:
            one.step()
        operations.append((1.0, list(counted.operations)))
        state = _bytes([v for one in trainee.optimizers for s in one.state.values() for v in s.values()])
        fixed, each = 0.0, most / batch
        if half < batch:
            smaller = take(config, built, steps.shapes(config, assumed, built.encoder.patches, half))
            peaks = [_forward_peak(smaller, kind, counted) for kind in range(len(smaller.shares))]
            larger = [_forward_peak(trainee, kind, counted) for kind in range(len(smaller.shares))]
            each = max(0.0, (max(larger) - max(peaks)) / (batch - half))
            fixed = max(0.0, most - each * batch)
        parameters = list(trainee.module.parameters())
        return StageCost(
            batch=batch,
            weights=_bytes(parameters),
            gradients=_bytes([p for p in parameters if p.requires_grad]),
            optimizer=state,
            largest_block=_largest_block(trainee.module),
            fixed_activations=fixed * hardware.allocator_factor,
            activations_per_sample=each * hardware.allocator_factor,
            operations=operations,
        )


def strategies(cost: StageCost, global_batch: int, hardware: Hardware) -> list[Use]:
    """One device; and on several, all of it on each (DDP) or everything divided (FSDP2)."""
    rows = [_use("one device", cost, global_batch, 1.0, 0, hardware)]
    if hardware.devices > 1:
        each = math.ceil(global_batch / hardware.devices)
        blocks = _UNSHARDED * cost.largest_block
        rows.append(_use(f"DDP, {hardware.devices}", cost, each, 1.0, 0, hardware))
        rows.append(_use(f"FSDP2, {hardware.devices}", cost, each, 1 / hardware.devices, blocks, hardware))
    return rows


def _use(name: str, cost: StageCost, batch: int, share: float, blocks: int, hardware: Hardware) -> Use:
    weights, gradients, state = cost.weights * share + blocks, cost.gradients * share, cost.optimizer * share
    runtime = hardware.runtime_gib * GIB
    left = hardware.memory_gib * GIB - weights - gradients - state - runtime - cost.fixed_activations
    return Use(
        strategy=name,
        batch=batch,
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=cost.fixed_activations + cost.activations_per_sample * batch,
        runtime=runtime,
        largest_batch=max(0, int(left // cost.activations_per_sample)) if cost.activations_per_sample else batch,
    )


def _forward_peak(trainee: steps.Trainee, kind: int, counted: costs.Meter) -> int:
    before = counted.live
    counted.forget()
    trainee.loss(kind)
    return counted.peak - before


def _gradients(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def _bytes(tensors: list) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def _largest_block(module: nn.Module) -> int:
    """Bytes of the largest layer or embedding: what FSDP2 gathers at once."""
    lists = [one for one in module.modules() if isinstance(one, nn.ModuleList)]
    blocks = [block for one in lists for block in one]
    blocks += [one for one in module.modules() if isinstance(one, nn.Embedding)]
    return max(_bytes(list(block.parameters())) for block in blocks)
