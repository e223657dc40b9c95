"""Models of transformers in folders of ours: no network, and no progress bar for what takes a moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def read(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` from the folder alone."""
    with _no_bar():
        return kind.from_pretrained(folder, local_files_only=True, **options)


def write(model: Any, folder: Path) -> None:
    """model.safetensors, in one piece, and config.json."""
    with _no_bar():
        model.save_pretrained(folder, max_shard_size="100GB")


@contextmanager
def _no_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
