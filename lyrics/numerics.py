"""How numbers are computed: precision, and kernels that give the same bytes again."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["auto", "fp32", "bf16"]


def use_deterministic_kernels() -> None:
    """Deterministic kernels only. What torch would fill new memory with is never read, so it need not be filled."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has products in bf16: a CPU without them falls back to a loop, an older GPU emulates them."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextlib.contextmanager
def autocast(device: torch.device, precision: Precision = "auto") -> Iterator[None]:
    """bf16 matrix products where asked for; `auto`: where the processor has them, elsewhere they are slower than fp32.

    On the CPU attention leaves the fused kernel, whose backward takes eight times as long in bf16 as in fp32.
    """
    if precision == "auto":
        precision = "bf16" if has_native_bf16(device) else "fp32"
    if precision == "fp32":
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if device.type == "cpu":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
