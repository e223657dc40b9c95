"""Files of strangers as streams: unpacked, by lines, by elements of a JSON document; memory never grows with the file.

Whatever is too long, too deep, not UTF-8 or no JSON is handed on as a `BadRecordError` in place of the value, and the
stream goes on after it. Only what leaves no way to go on (a cut file, brackets that do not match) is an `InputError`.
"""

import gzip
import io
import json
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lyrics.data.json_splitter import MalformedError, Splitter
from lyrics.data.records import BadRecordError, printable
from lyrics.errors import InputError

MAX_RECORD_BYTES = 4 << 20
"""Of one line, or one element of a document. Parsed, four megabytes of brackets are already two hundred."""
MAX_EXPANSION = 200
"""How many times its size a gzip file may unpack to, once it has given a gigabyte. Text reaches about 20."""
_FREE_BYTES = 1 << 30
_CHUNK = 1 << 18
_GZIP = b"\x1f\x8b"
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


class Unpacked(io.RawIOBase):
    """The bytes of a file, unpacked where it is gzip (recognised by its first bytes, whatever its name)."""

    def __init__(self, path: Path) -> None:
        self._path, self._given = path, 0
        self._raw = _open(path)
        packed = self._raw.read(2) == _GZIP
        self._raw.seek(0)
        self._inner: Any = gzip.GzipFile(fileobj=self._raw) if packed else self._raw

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """In a packed file only forwards, which unpacks what lies between."""
        if self._inner is self._raw:
            return self._raw.seek(offset, whence)
        target = offset + (self.tell() if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or target < self.tell():
            raise io.UnsupportedOperation("a packed file is read forwards only")
        buffer = bytearray(_CHUNK)
        while (left := target - self.tell()) > 0 and self.readinto(memoryview(buffer)[:left]):
            pass
        return self.tell()

    def tell(self) -> int:
        return self._inner.tell()

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._inner.read(len(buffer))
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{self._path} cannot be read: {printable(error)}") from None
        buffer[: len(content)] = content
        self._given += len(content)
        if self._given > _FREE_BYTES and self._given > MAX_EXPANSION * max(self._raw.tell(), 1):
            raise InputError(
                f"{self._path} unpacks to more than {MAX_EXPANSION} times its size; a text does not: "
                "unpack it yourself if you trust it"
            )
        return len(content)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _open(path: Path) -> BinaryIO:
    try:
        if stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            return path.open("rb")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    raise InputError(f"{path} does not exist or is not a file; expected one there")


def open_bytes(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked where it is gzip.

    Raises:
        InputError: on opening, if there is no such file; on reading, if it is damaged or a decompression bomb.
    """
    return io.BufferedReader(Unpacked(path), _CHUNK)


def lines(path: Path, limit: int = MAX_RECORD_BYTES) -> Iterator[tuple[str, bytes | BadRecordError]]:
    """`line N` and its bytes without the line's end; blank lines are left out.

    Raises:
        InputError: if the file is missing, damaged or not in a byte-wise encoding.
    """
    number = 0
    with open_bytes(path) as opened:
        while line := opened.readline(limit + 1):
            number += 1
            if number == 1:
                _refuse_wide(path, line)
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > limit and not line.endswith(b"\n"):
                size = len(line)
                while rest := opened.readline(_CHUNK):
                    size += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield f"line {number}", BadRecordError(f"line too long: {size} bytes, at most {limit} are read")
            elif line.strip():
                yield f"line {number}", line.rstrip(b"\r\n")


def _refuse_wide(path: Path, start: bytes) -> None:
    if encoding := _BYTE_ORDER_MARKS.get(start[:2]):
        raise InputError(f"{path} is not UTF-8 text but {encoding}; save it as UTF-8")


def text_lines(path: Path, limit: int = MAX_RECORD_BYTES) -> Iterator[tuple[str, str | BadRecordError]]:
    """`lines` as text: UTF-8 or, where a line is not, Windows-1252, which old lists of captions are in."""
    for place, line in lines(path, limit):
        if isinstance(line, BadRecordError):
            yield place, line
            continue
        try:
            yield place, line.decode()
        except UnicodeDecodeError:
            yield place, line.decode("cp1252", "replace")


def json_lines(path: Path, limit: int = MAX_RECORD_BYTES) -> Iterator[tuple[str, Any]]:
    """One JSON value a line; a file that holds one JSON array is read as its elements.

    Raises:
        InputError: if the file is missing, damaged, or an array that does not end.
    """
    with open_bytes(path) as opened:
        start = opened.peek(_CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"["):
        yield from elements(path, limit=limit)
        return
    for place, line in lines(path, limit):
        yield place, line if isinstance(line, BadRecordError) else parse(line)


def parse(content: bytes) -> Any:
    """The JSON value, or a `BadRecordError` that says why there is none."""
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError as error:
        return BadRecordError(f"not UTF-8 text: at byte {error.start} of the record")
    except json.JSONDecodeError as error:
        return BadRecordError(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets too deep
        return BadRecordError(f"not usable JSON: {error}")


def elements(
    path: Path, key: str | None = None, *, kind: str = "list", limit: int = MAX_RECORD_BYTES
) -> Iterator[tuple[str, Any]]:
    """The elements of a JSON list or object: that of the whole document, or the one at `key` of it.

    Args:
        kind: `list`, or `object`: its elements are then (name, value) pairs.

    Raises:
        InputError: naming file, line and column if its brackets do not match, or it is no such document.
    """
    splitter = Splitter(key, kind, limit)
    with open_bytes(path) as opened:
        _refuse_wide(path, opened.peek(2))
        index = 0
        try:
            while chunk := opened.read(_CHUNK):
                for content in splitter.feed(chunk):
                    yield f"{key or ''}[{index}]", _element(content, kind)
                    index += 1
            splitter.finish()
        except MalformedError as error:
            place = _line_and_column(path, error.byte)
            raise InputError(f"{path} is not valid JSON: {error} at {place}; correct or replace the file") from None
    if splitter.found != kind:
        wanted = f'a JSON object with a list "{key}"' if key else f"a JSON {kind}"
        found = f"keys {sorted(splitter.keys)}" if splitter.top == "object" and key else splitter.top or "no brackets"
        raise InputError(f"{path}: expected {wanted}, found {found}")


def _element(content: bytes | BadRecordError, kind: str) -> Any:
    if isinstance(content, BadRecordError):
        return content
    if kind == "list":
        return parse(content)
    value = parse(b"{" + content + b"}")
    if isinstance(value, BadRecordError):
        return value
    return next(iter(value.items())) if value else BadRecordError("not JSON: expected a name and a value")


def _line_and_column(path: Path, byte: int) -> str:
    line, start, seen = 1, 0, 0
    with open_bytes(path) as opened:
        while seen < byte and (chunk := opened.read(min(_CHUNK, byte - seen))):
            line += chunk.count(b"\n")
            if b"\n" in chunk:
                start = seen + chunk.rindex(b"\n") + 1
            seen += len(chunk)
    return f"line {line}, column {byte - start + 1}"
