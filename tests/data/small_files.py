"""Small pictures, tars and documents that tests of readers write."""

import io
import json
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lyrics import seeding
from lyrics.data.records import Record, Rejected

MIB = 1 << 20


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    pixels = seeding.rng("test jpeg", seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 10, 10)).save(buffer, kind)
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims `side` × `side` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def save(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return path.name


def save_lines(path: Path, values: Iterable[object]) -> str:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in values))
    return path.name


def tar_of(path: Path, *members: tuple[str, bytes]) -> str:
    with tarfile.open(path, "w") as opened:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return path.name


def peak_of(work) -> int:
    """The most bytes that Python objects took while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def least_peak_of(work) -> int:
    """Of three times: a table of the interpreter's own may grow by megabytes at any time, but not each time."""
    return min(peak_of(work) for _ in range(3))


def divided(found):
    """The records, and place and reason of what was rejected."""
    found = list(found)
    records = [item for item in found if isinstance(item, Record)]
    return records, [(item.record, item.reason) for item in found if isinstance(item, Rejected)]
