"""What a piece of computation costs, counted while it runs on tensors without data: products, traffic, memory."""

import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from torch.utils.weak import WeakIdKeyDictionary

from lyrics.plan.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class Operation:
    """One call of a kernel: `flops` of its products, `moved` bytes read and written, whether in half precision."""

    flops: int
    moved: int
    half: bool


class Meter(TorchDispatchMode):
    """Notes every operation, and how many bytes of tensors that were made inside live at once.

    Attributes:
        operations: in the order in which they ran.
        peak: most bytes alive since the last `forget`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten" and func.namespace != "lyrics":
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for tensor in made:
            self._watch(tensor.untyped_storage())
        if not (func.is_view or func in _FREE):
            formula = flop_registry.get(func._overloadpacket)
            half = any(t.dtype in (torch.bfloat16, torch.float16) for t in read)
            self.operations.append(
                Operation(
                    flops=formula(*args, **kwargs, out_val=out) if formula else 0,
                    moved=sum(t.numel() * t.element_size() for t in [*read, *made]),
                    half=half,
                )
            )
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, size).atexit = False

    def _freed(self, size: int) -> None:
        self.live -= size

    def forget(self) -> None:
        """Start counting anew; what is alive stays known."""
        self.operations.clear()
        self.peak = self.live


_FREE = {torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format, torch.ops.aten._unsafe_view.default}


def flops(operations: list[Operation]) -> int:
    return sum(one.flops for one in operations)


def seconds(operations: list[Operation], hardware: Hardware) -> float:
    """A roofline: each operation waits for the slower of its products and its memory traffic, and for its start."""
    total = 0.0
    for one in operations:
        rate = (hardware.bf16_tflops if one.half else hardware.fp32_tflops) * 1e12
        total += hardware.microseconds_per_operation * 1e-6
        total += max(one.flops / rate, one.moved / (hardware.bandwidth_gb_s * 1e9))
    return total


def compiled(operations: list[Operation]) -> list[Operation]:
    """What a compiler makes of them: all between two products becomes one kernel with the traffic of the largest."""
    fused: list[Operation] = []
    for products, group in itertools.groupby(operations, lambda one: one.flops > 0):
        run = list(group)
        fused += run if products else [max(run, key=lambda one: one.moved)]
    return fused


@contextlib.contextmanager
def metered(*, fused_attention: bool) -> Iterator[Meter]:
    """Run what is inside on tensors that have shapes and no data, and meter it.

    Args:
        fused_attention: attention as CUDA's kernels compute it, which keep no probabilities. Off, it is what the CPU
            does with the same masks, precision and dropout.
    """
    attention = F.scaled_dot_product_attention
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        if fused_attention:
            F.scaled_dot_product_attention = _fused  # type: ignore[assignment]
        try:
            yield meter
        finally:
            F.scaled_dot_product_attention = attention  # type: ignore[assignment]


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    heads = query.shape[1] // key.shape[1]  # grouped keys are shared by the kernel; their size hardly counts
    if heads > 1:
        key, value = (x.repeat_interleave(heads, 1) for x in (key, value))
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.bfloat16) for x in (query, key, value))
    return _attention(query, key, value)


@torch.library.custom_op("lyrics::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise AssertionError("it stands for a kernel, and is only ever counted")


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("lyrics::attention_backward", mutates_args=())
def _attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    raise AssertionError("it stands for a kernel, and is only ever counted")


@_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(grad, *ctx.saved_tensors)


_attention.register_autograd(_back, setup_context=_keep)


def _products(query_shape: Any, key_shape: Any) -> int:
    batch, heads, rows, width = query_shape
    return 2 * batch * heads * rows * key_shape[2] * width


@register_flop_formula(torch.ops.lyrics.attention)
def _forward_flops(query: Any, key: Any, value: Any, out_shape: Any = None, **_: Any) -> int:
    return 2 * _products(query, key)


@register_flop_formula(torch.ops.lyrics.attention_backward)
def _backward_flops(grad: Any, query: Any, key: Any, value: Any, out: Any, out_shape: Any = None, **_: Any) -> int:
    return 5 * _products(query, key)  # the kernel computes the scores again
