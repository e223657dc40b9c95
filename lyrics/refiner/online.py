"""Image tokens from the pictures themselves, in the step that asks for them (`refine.features: online`).

Only the image tokens: they are most of what is kept, and one pass of one network. Tags, boxes and masks have to be
known before training, which reads them as text, so the local tokens that come with them are kept.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lyrics.config import Refine
from lyrics.data.files import BadImageError
from lyrics.data.webdataset import open_image
from lyrics.errors import InputError
from lyrics.model.vision import ImageEncoder, load_image_encoder


class Looker:
    """The frozen encoder, which looks at pictures as `refine` does.

    Args:
        batch_size: that of `refine`: a batch of another size may end in other last bits.
    """

    def __init__(self, encoder: ImageEncoder, device: torch.device, batch_size: int) -> None:
        self.encoder, self.device, self.batch_size = encoder, device, batch_size

    @torch.no_grad()
    def __call__(self, paths: Sequence[str]) -> np.ndarray:
        """Image tokens (n, P, D) of the pictures at `ImageRecord.path`, float32.

        Raises:
            InputError: a picture is missing or broken.
        """
        found = []
        with ThreadPoolExecutor(os.cpu_count()) as pool, torch.autocast(self.device.type, enabled=False):
            images = list(pool.map(open_refined, paths))
            for start in range(0, len(images), self.batch_size):
                part = images[start : start + self.batch_size]
                found.append(self.encoder.look(part, self.device, self.batch_size).float().cpu().numpy())
        return np.concatenate(found)


def looker(clip: Path, settings: Refine, device: torch.device) -> Looker | None:
    """None where `refine` kept what the encoder saw.

    Raises:
        InputError: there is no encoder in `clip`.
    """
    if settings.features == "cached":
        return None
    return Looker(load_image_encoder(clip).to(device), device, settings.batch_size)


def open_refined(path: str) -> Image.Image:
    """A picture that `ingest` let through."""
    try:
        return open_image(path)
    except BadImageError as error:
        raise InputError(
            f"{path} cannot be used ({error}); ingest sets such pictures aside: run python -m lyrics ingest"
        ) from None
