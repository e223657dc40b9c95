"""Several processes, each with its device, that train as one (torchrun; DDP or FSDP2).

Every rank computes its slice of the joint batch. A loss is a sum over that slice divided by the joint count, so the
joint loss is the sum over ranks. With one process nothing here touches a process group.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lyrics.errors import InputError

Strategy = Literal["ddp", "fsdp"]


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU; under torchrun each process takes the CUDA device of its local rank."""
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return torch.device(name)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def own(self, batch_size: int) -> slice:
        """This rank's part of a joint batch."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def check(self, batch_size: int, accumulate: int, name: str) -> None:
        """
        Raises:
            InputError: the joint batch cannot be cut into equal parts.
        """
        if batch_size % (self.size * accumulate):
            raise InputError(
                f"{name}.batch_size is {batch_size}, which {self.size} processes × {name}.accumulate {accumulate} do "
                f"not divide; make it a multiple of {self.size * accumulate}"
            )

    def gather(self, x_bX: Tensor) -> Tensor:
        """The parts of all ranks, in their order, with gradients."""
        return x_bX if self.size == 1 else _Gather.apply(x_bX)

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Rank 0 does it first, then the others."""
        if self.size > 1 and not self.first:
            dist.barrier()
        yield
        if self.size > 1 and self.first:
            dist.barrier()

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, without gradients."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    """All-gather along the first dimension; its gradient is the sum of what all ranks made of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x_bX: Tensor) -> Tensor:
        parts = [torch.empty_like(x_bX) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_bX.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient_BX = gradients[0].contiguous()
        dist.all_reduce(gradient_BX)
        return gradient_BX.chunk(dist.get_world_size())[dist.get_rank()]


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among those that torchrun started; alone where it did not."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def prepare(
    model: nn.Module, blocks: Sequence[nn.Module], ranks: Ranks, strategy: Strategy, device: torch.device
) -> nn.Module:
    """`model` as the ranks train it: itself where there is one.

    Args:
        blocks: what FSDP2 shards one by one; the rest of `model` is one more group.
    """
    if ranks.size == 1:
        return model.to(device)
    if strategy == "ddp":
        model.to(device)
        # Not every parameter takes part in every step: objectives alternate, sources may be switched off.
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True
        )
    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
        if hasattr(block, "remember"):
            register_fsdp_forward_method(block, "remember")
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def gradients_at_the_end(model: nn.Module, last: bool) -> Iterator[None]:
    """Reduce gradients over ranks with the last of a step's micro-batches only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    yield


def whole(value: Any) -> Any:
    """A tensor without its sharding, or nested mappings and lists of such, on the CPU. All ranks call it together."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach().cpu()
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def copy_whole(parameter: Tensor, value: Tensor) -> None:
    """Put a whole tensor into a parameter that may be sharded."""
    with torch.no_grad():
        parameter.copy_(_like(parameter, value))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole optimizer state; what belongs to a sharded parameter is sharded alike."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of_parameter = {
        index: {
            key: _like(parameters[index], value) if isinstance(value, Tensor) and value.ndim else value
            for key, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": of_parameter})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value
