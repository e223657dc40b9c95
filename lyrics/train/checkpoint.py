"""Atomic checkpoints in a stage's work folder: the last are kept; a damaged newest falls back to the one before."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lyrics.io import atomic_path

KEPT = 2
log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors and plain values) for `step`; older than the last `KEPT` are removed."""
    with atomic_path(folder / f"{step:08d}.pt") as temporary, temporary.open("wb") as opened:
        torch.save({**state, "step": step}, opened)
    for old in sorted(folder.glob("*.pt"))[:-KEPT]:
        old.unlink()


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint; a damaged one is named in a warning and passed over."""
    for path in sorted(folder.glob("*.pt"), reverse=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); falling back to the checkpoint before it", path, error)
    return None
