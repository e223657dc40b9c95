"""Precision as asked for, attention away from the CPU's slow kernel, and memory that is not filled for nothing."""

import pytest
import torch
from torch.nn import functional

from lyrics import numerics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _settings_as_before():
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def product() -> torch.Tensor:
    return functional.linear(torch.ones(2, 8), torch.ones(3, 8))


def test_bf16_products_without_the_fused_attention_and_both_undone_afterwards() -> None:
    with numerics.autocast(CPU, "bf16"):
        assert product().dtype == torch.bfloat16
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert product().dtype == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()


def test_fp32_changes_nothing() -> None:
    with numerics.autocast(CPU, "fp32"):
        assert product().dtype == torch.float32 and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("native", [True, False])
def test_auto_asks_the_processor(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    with numerics.autocast(CPU, "auto"):
        assert product().dtype == (torch.bfloat16 if native else torch.float32)


def test_deterministic_kernels_do_not_fill_new_memory() -> None:
    numerics.use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
