"""rejected.parquet: every record that was set aside, written as they come."""

import collections
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lyrics.data.records import Rejected, printable

_SCHEMA = pa.schema([("source", pa.string()), ("record", pa.string()), ("reason", pa.string())])
_ROWS_AT_ONCE = 2_000


class Ledger:
    """Rows go to the file in groups; `reasons` counts them by the part of the reason before its first colon."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """Args: root: sources below this folder are named relative to it."""
        self.reasons: collections.Counter[str] = collections.Counter()
        self._root = root
        self._path = path
        self._writer: pq.ParquetWriter | None = None  # nothing is there before there is something to write
        self._rows: list[dict[str, Any]] = []

    def add(self, rejected: Rejected) -> None:
        self.reasons[rejected.reason.partition(":")[0]] += 1
        row = {key: printable(value) for key, value in vars(rejected).items()}
        self._rows.append(row | {"source": self._relative(rejected.source)})
        if len(self._rows) == _ROWS_AT_ONCE:
            self._write()

    def close(self) -> None:
        """Write the rest, and the file even if it has no row."""
        self._write().close()

    def _write(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, _SCHEMA)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=_SCHEMA))
        self._rows = []
        return self._writer

    def _relative(self, source: str) -> str:
        path = Path(source)
        below = self._root is not None and path.is_relative_to(self._root)
        return printable(path.relative_to(self._root or "").as_posix() if below else source)
