"""The files of one shard of features: an array each, memory-mapped, and shard.json with their shapes and checksums.

NAME.npy holds the values, NAME.scale.npy the scales of int8. An array that shard.json does not name among the kept is
computed from the pictures (`refine.features: online`). Its checksum is there all the same: it says of which pictures,
and seen by which encoder, so that whatever is trained on the shard is known to be out of date when these change.
"""

import dataclasses
import functools
import math
import mmap
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from lyrics import io
from lyrics.errors import InputError
from lyrics.refiner.precision import SCALE, STORED, FeatureDtype, Packed, unpack

MANIFEST = "shard.json"
_AGAIN = "make it again with: python -m lyrics refine"
_DIGITS = 16  # of a checksum, in messages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """Shapes by array, checksums by file, and the arrays whose files are there."""

    feature_dtype: FeatureDtype
    kept: tuple[str, ...]
    sha256: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    def files(self) -> list[str]:
        """Names of the files that are there."""
        kept = {file for name in self.kept for file in (_values_file(name), _scale_file(name))}
        return [name for name in self.sha256 if name in kept]


@dataclasses.dataclass(frozen=True)
class OpenShard:
    """An opened shard: values and scales of the arrays that it holds."""

    manifest: Manifest
    packed: dict[str, Packed]

    def read(self, name: str, row: int, count: int | None = None) -> np.ndarray | None:
        """The first `count` tokens of a picture (None: all), copied; None where the shard does not hold the array."""
        if name not in self.packed:
            return None
        packed = self.packed[name]
        scale_X = None if packed.scale_X is None else packed.scale_X[row, :count]
        found = unpack(Packed(packed.values_XD[row, :count], scale_X), self.manifest.feature_dtype)
        return np.array(found) if found.dtype == np.float16 else found


_MANIFEST = TypeAdapter(Manifest)


def write(folder: Path, arrays: dict[str, list[Packed]], feature_dtype: FeatureDtype, kept: Sequence[str]) -> None:
    """Write the arrays, given picture by picture, and what says whether they are whole; then remove those not kept."""
    shapes = {}
    for name, pictures in arrays.items():
        values = np.stack([packed.values_XD for packed in pictures])
        shapes[name] = values.shape
        save(folder / _values_file(name), values)
        if feature_dtype == "int8":
            save(folder / _scale_file(name), np.stack([p.scale_X for p in pictures if p.scale_X is not None]))
    written = sorted(folder.glob("*.npy"))
    manifest = Manifest(
        feature_dtype=feature_dtype,
        kept=tuple(kept),
        sha256={path.name: io.sha256_file(path) for path in written},
        shapes=shapes,
    )
    for path in written:
        if path.name not in manifest.files():
            path.unlink()
    io.write_json(folder / MANIFEST, dataclasses.asdict(manifest))


def save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as opened:
        np.save(opened, array, allow_pickle=False)
        opened.flush()
        os.fsync(opened.fileno())


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        InputError: it is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        return _MANIFEST.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{path} cannot be read ({why:.200}); {_AGAIN}") from None


def verify(folder: Path) -> int:
    """Compare every file of the shard with its checksum; returns how many bytes that were.

    Raises:
        InputError: naming the first file that is missing or another than was written.
    """
    size = 0
    manifest = read_manifest(folder)
    for name in manifest.files():
        path, expected = folder / name, manifest.sha256[name]
        try:
            found = io.sha256_file(path)
            size += path.stat().st_size
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}); {_AGAIN}") from None
        if found != expected:
            raise InputError(
                f"{path} is damaged: its sha256 is {found[:_DIGITS]}…, expected {expected[:_DIGITS]}… by {MANIFEST}; "
                f"{_AGAIN}"
            )
    return size


def open_shard(folder: Path, rows: int) -> OpenShard:
    """Map the arrays of a shard of which `rows` rows are known.

    Raises:
        InputError: a file is missing, or holds something else than shard.json says.
    """
    manifest = read_manifest(folder)
    stored, packed = STORED[manifest.feature_dtype], {}
    for name, shape in manifest.shapes.items():
        if shape[0] < rows:
            raise InputError(f"{folder / MANIFEST} tells of {shape[0]} pictures, expected at least {rows}; {_AGAIN}")
        if name in manifest.kept:
            values = _map(folder / _values_file(name), shape, stored)
            int8 = manifest.feature_dtype == "int8"
            packed[name] = Packed(values, _map(folder / _scale_file(name), shape[:-1], SCALE) if int8 else None)
    return OpenShard(manifest, packed)


def _map(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    try:
        array = _map_as_saved(path, shape, dtype)
        if array is None:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}); {_AGAIN}") from None
    if array.shape != shape or array.dtype != dtype:
        raise InputError(f"{path} holds {array.dtype} {array.shape}, expected {dtype} {shape}; {_AGAIN}")
    return array.view(np.ndarray)  # still mapped; rows of a memmap take longer to cut out


def _map_as_saved(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray | None:
    """The array, where the file is as `save` writes one of this shape; else None.

    `np.load` parses the header as Python, which takes ten times as long as the rest. Where a split has more shards than
    are kept open, most pictures of a batch open one.
    """
    header = _header(shape, dtype)
    length = math.prod(shape) * dtype.itemsize
    with path.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if not length or size != len(header) + length or opened.read(len(header)) != header:
            return None
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(content, dtype, offset=len(header)).reshape(shape)


@functools.lru_cache
def _header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    written = BytesIO()
    np.lib.format.write_array_header_1_0(written, described)
    return written.getvalue()


def _values_file(name: str) -> str:
    return f"{name}.npy"


def _scale_file(name: str) -> str:
    return f"{name}.scale.npy"
