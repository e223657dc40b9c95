"""Parquet tables as rows, whatever their columns hold."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lyrics.data.records import BadRecordError, printable
from lyrics.errors import InputError

_ROWS_AT_ONCE = 1024
_MAX_BYTES = 80_000  # of one cell: as many as the longest text that is read can have


def columns(path: Path) -> list[str]:
    """The names of a table's columns.

    Raises:
        InputError: if it is no readable parquet file.
    """
    try:
        return [field.name for field in _open(path).schema_arrow]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, 0, error) from None


def rows(path: Path, names: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """`row N` with its cells in these columns: a text, a number, None, or a `BadRecordError` for an endless one.

    Raises:
        InputError: if it is no readable parquet file, naming the row.
    """
    number = 0
    try:
        for batch in _open(path, list(names)).iter_batches(_ROWS_AT_ONCE, columns=list(names)):
            arrays = [batch.column(batch.schema.get_field_index(name)) for name in names]
            for row in range(batch.num_rows):
                yield f"row {number}", [_cell(array[row]) for array in arrays]
                number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(path, number, error) from None


def _open(path: Path, repeating: list[str] | None = None) -> pq.ParquetFile:
    """Texts that repeat stay in the file's dictionary: unfolded, a small file can hold gigabytes of them."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise OSError("no file")
    return pq.ParquetFile(path, buffer_size=1 << 20, read_dictionary=repeating)


def _cell(scalar: Any) -> Any:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    if isinstance(scalar, pa.StringScalar | pa.LargeStringScalar | pa.BinaryScalar | pa.LargeBinaryScalar):
        content = scalar.as_buffer()
        if content is None:
            return None
        if content.size > _MAX_BYTES:
            return BadRecordError(f"endless text: {content.size} bytes in a cell")
        return content.to_pybytes().decode("utf-8", "replace")
    return scalar.as_py() if pa.types.is_integer(scalar.type) else None


def _unreadable(path: Path, row: int, error: Exception) -> InputError:
    why = f"not a readable parquet file from row {row} on: {printable(error)}"
    return InputError(f"{path} is {why}; write or download it again")
