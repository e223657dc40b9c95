"""Cuts a JSON document into the elements of one of its containers, from chunks of bytes, holding one element at most.

The elements are not parsed here: what lies between two brackets may be anything. Only strings and brackets count.
"""

import re
from collections.abc import Iterator

from lyrics.data.records import BadRecordError

MAX_DEPTH = 200
# A whole string, or one sign of structure; a quotation mark alone opens a string that the buffer does not end.
_INSIDE = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_STRING = rb'"' + _INSIDE + rb'"'
_REST_OF_STRING = re.compile(_INSIDE, re.DOTALL)
_TOKEN = re.compile(_STRING + rb'|["\[\]{},]', re.DOTALL)
# Within an element a bracket pair without others inside is passed over at once: most records are nothing else.
_FLAT = rb'[^\[\]{}"]*+(?:' + _STRING + rb'[^\[\]{}"]*+)*+'
_TOKEN_INSIDE = re.compile(rb"\{" + _FLAT + rb"\}|\[" + _FLAT + rb"\]|" + _TOKEN.pattern, re.DOTALL)
_OPENS = {b"[": "list", b"{": "object"}
_OPENED_BY = {b"]": b"[", b"}": b"{"}
_KEYS_SHOWN = 8


class MalformedError(ValueError):
    """`byte` is where in the document it stops being one."""

    def __init__(self, message: str, byte: int) -> None:
        super().__init__(message)
        self.byte = byte


class Splitter:
    """Fed with chunks, gives the bytes of each element of the container at `key` (None: of the whole document).

    An element longer than `limit` is passed over; a `BadRecordError` stands in its place.
    """

    def __init__(self, key: str | None, kind: str, limit: int) -> None:
        self.kind, self.limit = kind, limit
        self.found: str | None = None  # what the container turned out to be
        self.top: str | None = None
        self.keys: list[str] = []
        self._key = key
        self._depth_inside = 1 if key is None else 2
        self._buffer = b""
        self._base = 0  # bytes of the document before the buffer
        self._at = 0  # in the buffer: what lies before is seen
        self._start: int | None = None  # in the buffer: where the element begins, if it is kept
        self._skipped: int | None = None  # in the document: where the element began that is too long to keep
        self._stack: list[bytes] = []
        self._last_string = b""
        self._in_string = False  # in one too long to keep

    def feed(self, chunk: bytes) -> Iterator[bytes | BadRecordError]:
        """Elements that end in this chunk.

        Raises:
            MalformedError: brackets do not match, or are nested too deep.
        """
        self._buffer += chunk
        while self._at < len(self._buffer):
            if self._in_string and not self._leave_string():
                break
            inside = self._start is not None or self._skipped is not None
            match = (_TOKEN_INSIDE if inside else _TOKEN).search(self._buffer, self._at)
            if match is None:
                self._at = len(self._buffer)
                break
            token = match[0]
            if token == b'"':
                self._at = match.start()
                if len(self._buffer) - self._at <= self.limit:
                    break
                self._in_string, self._at = True, self._at + 1
                continue
            self._at = match.end()
            if len(token) > 1:
                self._last_string = token[1:-1]
            elif token in _OPENS:
                self._open(token)
            else:
                yield from self._separate(token, match.start())
        self._forget()

    def finish(self) -> None:
        """Call at the end of the document.

        Raises:
            MalformedError: it is not complete.
        """
        if self._stack or self._in_string or self._buffer[self._at :].strip().startswith(b'"'):
            raise MalformedError("it ends in the middle", self._base + len(self._buffer))

    def _open(self, token: bytes) -> None:
        if len(self._stack) == MAX_DEPTH:
            raise MalformedError(f"nested deeper than {MAX_DEPTH}", self._base + self._at - 1)
        self._stack.append(token)
        depth = len(self._stack)
        if depth == 1:
            self.top = _OPENS[token]
        elif depth == 2 and self.top == "object" and len(self.keys) < _KEYS_SHOWN:
            self.keys.append(self._last_string[:40].decode(errors="replace"))
        if depth == self._depth_inside and (self._key is None or self._is_wanted()):
            self.found = _OPENS[token]
            if self.found == self.kind:
                self._start = self._at

    def _is_wanted(self) -> bool:
        return self.top == "object" and self._last_string == (self._key or "").encode()

    def _separate(self, token: bytes, start: int) -> Iterator[bytes | BadRecordError]:
        """A comma or a closing bracket: the end of an element where it stands directly in the container."""
        at_its_level = len(self._stack) == self._depth_inside and (self._start is not None or self._skipped is not None)
        if at_its_level:
            began = self._base + self._start if self._start is not None else self._skipped or 0
            if (size := self._base + start - began) > self.limit:
                yield BadRecordError(f"record too long: {size} bytes, at most {self.limit} are read")
            elif token == b"," or self._buffer[self._start : start].strip():
                yield self._buffer[self._start : start].strip()
            self._skipped, self._start = None, self._at if token == b"," else None
        if token != b"," and (not self._stack or self._stack.pop() != _OPENED_BY[token]):
            raise MalformedError(f"unexpected {token.decode()}", self._base + start)

    def _leave_string(self) -> bool:
        """Go to the end of a string that is not kept; False where the buffer does not reach it."""
        rest = _REST_OF_STRING.match(self._buffer, self._at)
        assert rest is not None  # it matches nothing at all, too
        self._at = rest.end()
        if self._buffer[self._at : self._at + 1] != b'"':
            return False  # at the end, or before a backslash whose sign is still to come
        self._at += 1
        self._in_string = False
        return True

    def _forget(self) -> None:
        """Drop what is seen and belongs to no element that is kept."""
        if self._start is not None and len(self._buffer) - self._start > self.limit:
            self._skipped, self._start = self._base + self._start, None
        keep = self._at if self._start is None else self._start
        self._buffer, self._base, self._at = self._buffer[keep:], self._base + keep, self._at - keep
        if self._start is not None:
            self._start = 0
