"""Pictures for the report: small data URIs, and masks as outlines."""

import base64
import io
from pathlib import Path

import contourpy
import numpy as np
from PIL import Image

from lyrics.data.files import has_exif
from lyrics.data.webdataset import image_bytes, open_image
from lyrics.foundation import masks

_MAX_SIDE_PX = 384
_KEEP_BYTES = 40_000
_QUALITY = 82
_MIN_OUTLINE_POINTS = 4


def data_uri(path: str | Path, max_side_px: int = _MAX_SIDE_PX) -> str:
    """The picture as a JPEG data URI; small JPEG files as they are, others scaled down.

    None keeps its EXIF: a browser would turn the picture by it, but not what is drawn over it, and it may say where the
    photograph was taken.

    Raises:
        InputError, BadImageError: the picture is missing or broken.
    """
    content = image_bytes(path)
    image = open_image(path)
    small = len(content) <= _KEEP_BYTES and max(image.size) <= max_side_px
    if not (small and content.startswith(b"\xff\xd8")) or has_exif(content):
        image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY)
        content = buffer.getvalue()
    return "data:image/jpeg;base64," + base64.b64encode(content).decode()


def outline(counts: str, width: int, height: int, points_per_side: int = 160) -> str:
    """The SVG path around a mask given as compressed COCO counts, empty without one; in pixels of the image.

    Points closer than `points_per_side` across the longer side are left out.
    """
    mask = masks.decode(counts, height, width)
    padded = np.pad(mask.astype(np.float32), 1)  # so that outlines close at the edge
    lines = contourpy.contour_generator(z=padded).lines(0.5)
    step = max(1, max(width, height) // points_per_side)
    parts = []
    for line in lines:
        points = np.asarray(line)[:-1:step] - 0.5
        if len(points) >= _MIN_OUTLINE_POINTS:
            parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)
