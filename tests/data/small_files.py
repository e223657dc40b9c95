"""Small pictures, tars and documents that tests of readers write."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lyrics import seeding


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    pixels = seeding.rng("test jpeg", seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


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
