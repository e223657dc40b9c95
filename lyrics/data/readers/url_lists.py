"""Lists of addresses with captions (Conceptual Captions, LAION): TSV, CSV, text or parquet beside a folder of pictures.

Nothing is downloaded: the pictures lie in the folder already, named by their row (counted from 0, without the header),
by a key, by the last part of their address, or by a column that says so.
"""

import contextlib
import csv
import dataclasses
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lyrics.data.disk_index import Index
from lyrics.data.readers import tables
from lyrics.data.records import BadRecordError, Record, Rejected, Sample, convert, name, text
from lyrics.data.streams import text_lines
from lyrics.errors import InputError

_COLUMNS = {
    "url": ("url", "image_url", "img_url", "photo_url", "link"),
    "caption": ("caption", "text", "txt", "alt", "alt_text", "description"),
    "key": ("key", "id", "image_id", "sample_id", "uid"),
    "file": ("file", "file_name", "filename", "image", "image_path", "img_path", "path"),
}
_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif")
_WIDTHS = (1, 5, 6, 8, 9, 12)  # of row numbers with leading zeros


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where in a row each thing stands; None for what it lacks."""

    url: int | None = None
    caption: int | None = None
    key: int | None = None
    file: int | None = None

    def at(self, what: str, row: Sequence[Any]) -> Any:
        place = getattr(self, what)
        cell = row[place] if place is not None and place < len(row) else None
        if isinstance(cell, BadRecordError):
            raise cell
        return cell


def each(path: Path, named_by: str | None) -> Iterator[Record | Rejected]:
    """A caption sample for each row, with the names that its picture may have.

    Args:
        named_by: `row`, `key`, `url`, `file`; None for the first of `file`, `key`, `url` that there is a column for.

    Raises:
        InputError: if the file is missing, damaged, or nothing tells its columns apart.
    """
    columns, rows = _parquet(path) if path.suffix == ".parquet" else _delimited(path)
    naming = named_by or next((what for what in ("file", "key", "url") if getattr(columns, what) is not None), "row")
    if naming != "row" and getattr(columns, naming) is None:
        raise InputError(f"{path} has no column to name pictures by {naming}; set named_by to row, key, url or file")
    with contextlib.closing(Index()) as claimed:
        numbered = ((place, (number, row)) for number, (place, row) in enumerate(rows))
        yield from convert(path, numbered, lambda found: _record(found[0], found[1], columns, naming, claimed))


def _record(number: int, row: Any, columns: Columns, naming: str, claimed: Index) -> Record:
    if isinstance(row, BadRecordError):
        raise row
    caption = text(columns.at("caption", row), "caption")
    url = columns.at("url", row)
    url = url.strip() if isinstance(url, str) else ""
    names = _names(number if naming == "row" else columns.at(naming, row), naming)
    if naming == "url" and not claimed.add(names[0], value=url) and claimed.get(names[0]) != url:
        raise BadRecordError(f"ambiguous file name: another address ends in {names[0]!r} too")
    sample = Sample(sample_id=f"row-{number}", image_id=names[0], task="caption", kind="caption", references=(caption,))
    return Record(images=names, samples=(sample,), meta={"url": url[:2048]} if url else {})


def _names(value: Any, naming: str) -> tuple[str, ...]:
    if naming == "row":
        return tuple(f"{value:0{width}d}.{suffix}" for width in _WIDTHS for suffix in _SUFFIXES)
    if naming == "url":
        try:
            value = urllib.parse.unquote(PurePosixPath(urllib.parse.urlsplit(value or "").path).name)
        except ValueError:  # brackets that are no address of the sixth version
            raise BadRecordError(f"bad address: {value[:60]!r}") from None
    given = name(value, naming)
    return (given, *(f"{given}.{suffix}" for suffix in _SUFFIXES))


def _delimited(path: Path) -> tuple[Columns, Iterator[tuple[str, Any]]]:
    """Columns and rows of a text file; tabs separate where the first line has one, else commas."""
    _, first = next(text_lines(path), ("", ""))
    if isinstance(first, BadRecordError):
        raise InputError(f"{path}: the first line cannot be used: {first}")
    tabs = "\t" in first
    try:
        head = first.split("\t") if tabs else next(csv.reader([first]), [])
    except csv.Error as error:
        raise InputError(f"{path}: the first line is not CSV: {error}; write one row a line") from None
    columns, has_header = _columns(path, head)
    rows = _tab_rows(path) if tabs else _comma_rows(path)
    if has_header:
        next(rows)
    return columns, rows


def _columns(path: Path, head: Sequence[str]) -> tuple[Columns, bool]:
    titles = [cell.strip().strip('"').lower() for cell in head]
    if any(title in names for title in titles for names in _COLUMNS.values()):
        return _titled(titles), True
    url = next((i for i, cell in enumerate(head) if cell.strip().startswith(("http://", "https://"))), None)
    file = next((i for i, title in enumerate(titles) if title.rpartition(".")[2] in _SUFFIXES), None)
    if url is None and file is None:
        raise InputError(
            f"{path}: nothing in the first row is an address or a picture's name; found {str(head)[:80]}; "
            "put a line with the columns' names at the top, e.g. url and caption"
        )
    known = url if url is not None else file
    caption = next((i for i in range(len(head)) if i != known), None)
    return Columns(url=url, caption=caption, file=file if url is None else None), False


def _titled(titles: Sequence[str]) -> Columns:
    """Each column by its title; of several the one that stands first in our list."""
    places = {}
    for what, names in _COLUMNS.items():
        places[what] = next((titles.index(one) for one in names if one in titles), None)
    return Columns(**places)


def _tab_rows(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in text_lines(path):
        yield place, line if isinstance(line, BadRecordError) else line.split("\t")


def _comma_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows may go over several lines, within quotation marks; a row's place is the line where it ends."""
    bad: list[tuple[str, BadRecordError]] = []
    place = ""

    def readable() -> Iterator[str]:
        nonlocal place
        for place, line in text_lines(path):
            if isinstance(line, BadRecordError):
                bad.append((place, line))
            else:
                yield line + "\n"

    rows = csv.reader(readable())
    while True:
        try:
            row: Any = next(rows, None)
        except csv.Error as error:  # a field of more than 131,072 characters: usually a quotation mark left open
            row = BadRecordError(f"not CSV: {error}")
        yield from bad
        bad.clear()
        if row is None:
            return
        yield place, row


def _parquet(path: Path) -> tuple[Columns, Iterator[tuple[str, Any]]]:
    names = tables.columns(path)
    wanted = {what: names[i] for what, i in vars(_titled([name.lower() for name in names])).items() if i is not None}
    if not wanted:
        raise InputError(f"{path} has none of the columns url, caption, key, file; found {names[:8]}")
    return Columns(**{what: i for i, what in enumerate(wanted)}), tables.rows(path, list(wanted.values()))
