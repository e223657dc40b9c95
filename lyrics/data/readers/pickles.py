"""Pickles of strangers that hold plain containers, numbers and texts only, and are refused for anything else.

A pickle is a program. Before it runs, every instruction is compared with a list of those that build lists, dicts,
tuples, numbers and texts: nothing that imports, calls or looks up. The module that runs it refuses names besides.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from lyrics.data.records import printable
from lyrics.errors import InputError

MAX_BYTES = 256 << 20
_ALLOWED = {
    *("PROTO", "FRAME", "MARK", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
}
_REMEMBERS = ("PUT", "BINPUT", "LONG_BINPUT")


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any, /) -> NoReturn:
        raise pickle.UnpicklingError("it refers to something outside")


def load_plain(path: Path) -> Any:
    """The value in `path`. Parts of it may be shared: walking through all of it may never end.

    Raises:
        InputError: if the file is missing, too large, damaged, or holds more than plain values.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; expected a pickle there")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes; a pickle of at most {MAX_BYTES} is read")
    content = path.read_bytes()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(content), start=1):
            if opcode.name not in _ALLOWED:
                raise pickle.UnpicklingError(f"the instruction {opcode.name} at byte {position} builds no plain value")
            # The unpickler makes room for every number up to the one that is remembered.
            if opcode.name in _REMEMBERS and not 0 <= int(argument or 0) <= count:
                raise pickle.UnpicklingError(f"the number {argument} at byte {position} is out of order")
        return _PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a damaged pickle raises whatever comes to hand
        raise InputError(f"{path} is not a pickle of plain values: {printable(error)}; nothing of it was run") from None
