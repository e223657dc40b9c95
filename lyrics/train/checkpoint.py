"""Atomic checkpoints in a stage's work folder: the last are kept; a damaged newest falls back to the one before.

A file is named by its step and the start of its sha256, since torch.load does not notice a changed byte of a tensor.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lyrics.io import sha256_file

_UNFINISHED = "unfinished.tmp"  # one name: what a killed writer left is written over
_DIGITS = 16
log = logging.getLogger(__name__)


def save(folder: Path, step: int, state: Mapping[str, Any], *, kept: int) -> None:
    """Write `state` (tensors and plain values) for `step`; older than the last `kept` are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / _UNFINISHED
    try:
        with unfinished.open("wb") as opened:
            torch.save({**state, "step": step}, opened)
            opened.flush()
            os.fsync(opened.fileno())
        saved = folder / f"{step:08d}-{sha256_file(unfinished)[:_DIGITS]}.pt"
        unfinished.replace(saved)
    finally:
        unfinished.unlink(missing_ok=True)
    # A file of this step or a later one was damaged, else training would have gone on from it.
    before = sorted(path for path in folder.glob("*.pt") if path.name[:8] < saved.name[:8])
    recent = before[max(0, len(before) + 1 - kept) :]
    for path in set(folder.glob("*.pt")) - {saved, *recent}:
        path.unlink()


def load_newest(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint; a damaged one is named in a warning and passed over.

    Returns:
        None where there is none, or none that is whole; a warning says the latter.
    """
    (folder / _UNFINISHED).unlink(missing_ok=True)
    paths = sorted(folder.glob("*.pt"), reverse=True)
    for path in paths:
        try:
            damage = None if _is_whole(path) else "its sha256 is not that of its name"
        except OSError as error:
            damage = str(error)
        if damage is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        log.warning("%s is damaged (%s); falling back to the checkpoint before it", path, damage)
    if paths:
        log.warning("No checkpoint in %s is whole; training starts anew", folder)
    return None


def _is_whole(path: Path) -> bool:
    return sha256_file(path)[:_DIGITS] == path.stem.partition("-")[2]
