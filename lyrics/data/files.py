"""What strangers name and draw: names that stay in their folder, pictures that are whole and no bombs."""

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Larger pictures are refused before they are decoded: a few kilobytes can claim gigabytes."""
MAX_IMAGE_BYTES = 64 << 20
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded, whatever the extension says. Others may start programs (EPS) or have decoders that few test."""
_MOVING = ("PNG", "WEBP", "GIF", "AVIF")
_SUFFIXES = {
    **{"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff", "AVIF": "avif"},
    "MPO": "jpg",  # a phone's JPEG with a second picture behind it
}
_T = TypeVar("_T")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class BadImageError(ValueError):
    """The bytes are not a usable picture; the message is the reason."""


def is_safe_name(name: object) -> bool:
    """A relative path that stays below its folder: not absolute, no drive, no `..`, no line break, NUL or the like."""
    if not isinstance(name, str) or not name or "\\" in name or ":" in name or _CONTROL.search(name):
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def decode(content: bytes | Path) -> Image.Image:
    """The whole picture as RGB, its pixels as they are stored: boxes refer to them, so EXIF orientation is ignored.

    CMYK is converted, alpha is left out (what was transparent shows the colour that is stored there), of an animated
    picture the first frame is taken.

    Raises:
        BadImageError: if it is no picture, is truncated, or has more than `MAX_PIXELS` pixels.
    """
    return _decoded(content, lambda image: image.convert("RGB"))


def measure(content: bytes) -> tuple[str, int, int]:
    """Suffix of the format that the bytes are in, width and height; only the header is read.

    Raises:
        BadImageError: as `decode`.
    """
    return _decoded(content, lambda image: (_SUFFIXES[str(image.format)], image.width, image.height))


def has_exif(content: bytes | Path) -> bool:
    """
    Raises:
        BadImageError: as `decode`.
    """
    return _decoded(content, lambda image: bool(image.getexif()))


def is_turned(content: bytes | Path) -> bool:
    """Whether EXIF asks for another orientation than that of the stored pixels, which other readers follow.

    Raises:
        BadImageError: as `decode`.
    """
    return _decoded(content, lambda image: image.getexif().get(ExifTags.Base.Orientation, 1) != 1)


def is_animated(content: bytes) -> bool:
    """Whether there are several frames; pages of a TIFF and the second picture that phones hide in a JPEG are none.

    Raises:
        BadImageError: as `decode`.
    """
    return _decoded(content, lambda image: image.format in _MOVING and getattr(image, "is_animated", False))


def _decoded(content: bytes | Path, use: Callable[[Image.Image], _T]) -> _T:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = io.BytesIO(content) if isinstance(content, bytes) else content
            with Image.open(source, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(f"{image.width} x {image.height} pixels, at most {MAX_PIXELS} are read")
                return use(image)
    except (BadImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImageError("not a picture") from None
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # on damaged bytes decoders raise whatever comes to hand: struct.error, KeyError …
        raise BadImageError(f"broken picture: {error}") from None


def pixel_hash(image: Image.Image) -> str:
    """Equal for equal pixels, whatever file they came in."""
    return hashlib.sha256(f"{image.size}".encode() + np.asarray(image).tobytes()).hexdigest()
