"""The numbers that features are kept as: fp16, bf16, or int8 with a scale for each token.

Shapes: X any leading dimensions, D width of a token.
"""

import dataclasses
from typing import Literal, TypeAlias

import numpy as np
import torch

FeatureDtype: TypeAlias = Literal["fp16", "bf16", "int8"]
STORED: dict[FeatureDtype, np.dtype] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}
"""Of the values in a file. numpy has no bf16: its bits are kept, the upper half of a float32's."""
SCALE = np.dtype(np.float32)
_LARGEST = {"fp16": float(np.finfo(np.float16).max), "bf16": torch.finfo(torch.bfloat16).max}
_INT8_LARGEST = 127


@dataclasses.dataclass(frozen=True)
class Packed:
    """Features as they are kept. `scale_X` is there for int8 only: what one step of a token's values is worth."""

    values_XD: np.ndarray
    scale_X: np.ndarray | None = None


def pack(array_XD: np.ndarray, dtype: FeatureDtype) -> Packed:
    """Round to the nearest number that `dtype` has; what is beyond its largest becomes the largest.

    Raises:
        ValueError: a value is not finite.
    """
    if not np.isfinite(array_XD).all():
        raise ValueError("a value is not finite; check the frozen part that computes it")
    if dtype == "int8":
        return _pack_int8(array_XD.astype(np.float32, copy=False))
    clipped_XD = np.clip(array_XD, -_LARGEST[dtype], _LARGEST[dtype])
    if dtype == "fp16":
        return Packed(clipped_XD.astype(np.float16))
    halves_XD = torch.from_numpy(np.ascontiguousarray(clipped_XD, np.float32)).to(torch.bfloat16)
    return Packed(halves_XD.view(torch.int16).numpy().view(np.uint16))


def _pack_int8(array_XD: np.ndarray) -> Packed:
    """The value of a token that is furthest from zero becomes ±127."""
    scale_X = np.abs(array_XD).max(-1, initial=0.0) / np.float32(_INT8_LARGEST)
    steps_XD = array_XD / np.where(scale_X > 0, scale_X, 1)[..., None]
    return Packed(np.clip(np.rint(steps_XD), -_INT8_LARGEST, _INT8_LARGEST).astype(np.int8), scale_X)


def unpack(packed: Packed, dtype: FeatureDtype) -> np.ndarray:
    """float16 as it is; bf16 and int8 as float32."""
    if dtype == "fp16":
        return packed.values_XD
    if dtype == "bf16":
        return (packed.values_XD.astype(np.uint32) << 16).view(np.float32)
    assert packed.scale_X is not None
    return packed.values_XD.astype(np.float32) * packed.scale_X[..., None]


def rounded(array_XD: np.ndarray, dtype: FeatureDtype) -> np.ndarray:
    """What would be read again if the array were kept."""
    return unpack(pack(array_XD, dtype), dtype)


def token_bytes(width: int, dtype: FeatureDtype) -> int:
    """What a token of `width` numbers takes on disk."""
    return width * STORED[dtype].itemsize + (SCALE.itemsize if dtype == "int8" else 0)
