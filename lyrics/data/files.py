"""Reading files that strangers wrote: JSON with the place of the error, names that stay in their folder, pictures."""

import gzip
import hashlib
import io
import json
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lyrics.errors import InputError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few kilobytes can claim gigabytes."""


class BadImageError(ValueError):
    """The bytes are not a usable picture; the message is the reason."""


def read_text(path: Path) -> str:
    """UTF-8 text, unpacked where the file is gzip (recognised by its first bytes, whatever its name)."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; expected a JSON file there") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def load_json(path: Path, text: str | None = None) -> Any:
    """The JSON document in `path`.

    Raises:
        InputError: naming the file and the line and column of the first error.
    """
    try:
        return json.loads(read_text(path) if text is None else text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{path} is not valid JSON: {error.msg} at {place}; correct or replace the file") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets thousands deep
        raise InputError(f"{path} is not usable JSON: {error}; correct or replace the file") from None


def load_json_lines(path: Path) -> list[Any]:
    """One JSON value a line; a file that holds one JSON array is read as that list.

    Raises:
        InputError: naming the file and the line of the first error.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        return load_json(path, text)
    values = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            place = f"line {number}, column {error.colno}"
            raise InputError(f"{path} is not valid JSON lines: {error.msg} at {place}; correct the line") from None
    return values


def records(path: Path, document: Any, key: str) -> list[dict[str, Any]]:
    """`document[key]`, checked to be a list of objects."""
    if not isinstance(document, dict) or not isinstance(document.get(key), list):
        found = f"keys {sorted(document)[:8]}" if isinstance(document, dict) else type(document).__name__
        raise InputError(f'{path}: expected a JSON object with a list "{key}", found {found}')
    for position, record in enumerate(document[key]):
        if not isinstance(record, dict):
            raise InputError(f"{path}: {key}[{position}] should be an object, found {type(record).__name__}")
    return document[key]


def is_safe_name(name: object) -> bool:
    """A relative path that stays below its folder: not absolute, no drive, no `..`, no odd characters."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name or ":" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def decode(content: bytes | Path) -> Image.Image:
    """The whole picture as RGB, its pixels as they are stored: boxes refer to them, so EXIF orientation is ignored.

    Raises:
        BadImageError: if it is no picture, is truncated, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
                return image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("not a picture") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {MAX_PIXELS} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise BadImageError(f"broken picture: {error}") from None


def pixel_hash(image: Image.Image) -> str:
    """Equal for equal pixels, whatever file they came in."""
    return hashlib.sha256(f"{image.size}".encode() + np.asarray(image).tobytes()).hexdigest()
