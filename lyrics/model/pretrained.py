"""Models of transformers in folders of ours: no network, no silence about missing weights, no noise about others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lyrics.errors import InputError


def read(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` from the folder alone. Weights of other parts (a text tower) may lie there too.

    Raises:
        InputError: the folder lacks weights of `kind`.
    """
    with _quiet():
        model, loaded = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    if missing := sorted(loaded["missing_keys"]):
        raise InputError(
            f"{folder} lacks {len(missing)} weights of {kind.__name__}, the first is {missing[0]}; expected a model of "
            "that class: make the part again"
        )
    return model


def write(model: Any, folder: Path) -> None:
    """model.safetensors, in one piece, and config.json."""
    with _quiet():
        model.save_pretrained(folder, max_shard_size="100GB")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
