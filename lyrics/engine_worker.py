"""What a worker of any engine does: it loads once, then does shard after shard. A failure is a value that travels."""

import contextlib
import dataclasses
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lyrics.errors import InputError
from lyrics.process import keep_freed_memory
from lyrics.stage import is_forbidden, is_full_disk

Do = Callable[[Any], int]


class WorkerLostError(RuntimeError):
    """A worker ended without an answer: killed, out of memory, or its node is gone."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An error of a worker; `trace` is its traceback, empty where there is none."""

    error: Exception
    trace: str = ""

    @property
    def is_permanent(self) -> bool:
        """Whether the user has to mend something before another attempt makes sense."""
        return isinstance(self.error, InputError) or is_full_disk(self.error) or is_forbidden(self.error)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or its Failure."""
    try:
        return function(*arguments)
    except Exception as error:
        return Failure(_portable(error), traceback.format_exc())


def begin(load: bytes, threads: int) -> Do:
    """In a worker process: the function that does one shard.

    The number of threads is told to OpenMP before torch is imported, which unpickling `load` may do, and to torch as
    soon as it is there: OpenMP alone would take no more than there are processors.
    """
    keep_freed_memory()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    loaded = pickle.loads(load)
    _tell_torch(threads)
    do = loaded()
    _tell_torch(threads)
    return do


def _tell_torch(threads: int) -> None:
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


@contextlib.contextmanager
def threads_here(count: int) -> Iterator[None]:
    """The same in the driver's own process; its former number of threads comes back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _portable(error: Exception) -> Exception:
    """The error itself where another process can have it, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
