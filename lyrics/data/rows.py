"""Parquet files as streams of rows: memory does not grow with the file."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lyrics import io

_ROWS_AT_ONCE = 1_000


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of which a part is held at a time."""
    with pq.ParquetFile(path) as opened:
        for batch in opened.iter_batches(_ROWS_AT_ONCE):
            yield from batch.to_pylist()


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], schema: pa.Schema, compression: str = "snappy") -> int:
    """Write a parquet file, of whose rows a part is held at a time; what is there under its name is whole.

    Returns:
        The number of rows.
    """
    left, count = iter(rows), 0
    with io.atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression=compression) as writer:
        while group := list(itertools.islice(left, _ROWS_AT_ONCE)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            count += len(group)
    return count
