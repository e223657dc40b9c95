"""Lyrics: a vision-language model with fine-grained grounding, from raw image-text pairs to a registered model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lyrics.inference import Lyrics


def load(where: str) -> Lyrics:
    """The model in the registry (`models:/lyrics@champion`) or in a folder, ready to answer."""
    from lyrics.inference import load as load_model  # late: importing torch costs seconds

    return load_model(where)
