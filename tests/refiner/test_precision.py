"""What rounding to each kept number may lose, and what it may not."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyrics.refiner.precision import Packed, pack, rounded, token_bytes, unpack

DTYPES = ("fp16", "bf16", "int8")
numbers = st.floats(-(2.0**20), 2.0**20, width=32)
tokens = arrays.arrays(np.float32, st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 7)), elements=numbers)


@given(tokens)
def test_fp16_and_bf16_are_the_nearest_numbers(array):
    np.testing.assert_array_equal(rounded(array, "fp16"), np.clip(array, -65504, 65504).astype(np.float16))
    np.testing.assert_array_equal(rounded(array, "bf16"), torch.from_numpy(array).to(torch.bfloat16).float().numpy())


@given(tokens)
def test_int8_is_off_by_half_a_step_of_its_token_and_keeps_what_is_largest(array):
    packed = pack(array, "int8")
    found = unpack(packed, "int8")
    assert packed.values_XD.dtype == np.int8 and packed.scale_X.shape == array.shape[:-1]
    largest = np.abs(array).max(-1, initial=0)
    assert (np.abs(found - array) <= largest[..., None] / 254 * (1 + 1e-5) + 1e-38).all()
    np.testing.assert_allclose(np.abs(found).max(-1, initial=0), largest, rtol=1e-6, atol=1e-38)
    np.testing.assert_array_equal(rounded(-array, "int8"), -found)


@given(tokens, st.sampled_from(DTYPES))
def test_a_token_is_rounded_alike_alone_and_among_others(array, dtype):
    whole = rounded(array, dtype)
    for place in np.ndindex(array.shape[:-1]):
        np.testing.assert_array_equal(rounded(array[place], dtype), whole[place])


@pytest.mark.parametrize(("dtype", "loss"), [("fp16", 2.1e-4), ("bf16", 1.7e-3), ("int8", 8e-3)])
def test_the_relative_error_of_gaussian_tokens(dtype, loss):
    array = np.random.default_rng(0).normal(size=(200, 192)).astype(np.float32)
    found = np.linalg.norm(rounded(array, dtype).astype(np.float64) - array) / np.linalg.norm(array)
    assert loss / 2 < found < loss


def test_extremes_stay_finite():
    array = np.array([[1e38, -3.4e38, 1e-45, 0.0]], np.float32)
    for dtype in DTYPES:
        assert np.isfinite(rounded(array, dtype)).all()
    np.testing.assert_array_equal(rounded(np.full((1, 3), 1e-45, np.float32), "int8"), 0)  # its scale would be 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_refused(value, dtype):
    with pytest.raises(ValueError, match="not finite"):
        pack(np.array([[1.0, value]], np.float32), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_takes_the_bytes_that_are_said(dtype):
    packed: Packed = pack(np.ones((5, 12), np.float32), dtype)
    found = packed.values_XD.nbytes + (0 if packed.scale_X is None else packed.scale_X.nbytes)
    assert found == 5 * token_bytes(12, dtype)
