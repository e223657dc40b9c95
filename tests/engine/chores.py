"""Shards whose doing shows what became of them: each writes its number, its square and the threads that torch had.

What a shard does besides is told by files in `fate`: `kill-3` kills the worker that does shard 3, `fail-3`, `refuse-3`,
`later-3`, `full-3` raise; each once for every line in the file. `log` gets a line whenever a shard is begun.
"""

import dataclasses
import errno
import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from lyrics import io
from lyrics.config import Engine
from lyrics.errors import InputError, RetryableError


@dataclasses.dataclass(frozen=True)
class Chore:
    number: int
    root: Path

    def __str__(self) -> str:
        return f"chore-{self.number}"

    @property
    def result(self) -> Path:
        return self.root / "results" / str(self.number)


def is_done(chore: Chore) -> bool:
    return chore.result.exists()


def chores(root: Path, count: int) -> list[Chore]:
    (root / "fate").mkdir(parents=True, exist_ok=True)
    return [Chore(number, root) for number in range(count)]


def settings(**changed: object) -> Engine:
    chosen = {"kind": "local", "address": None, "workers": 1, "threads_per_worker": 1, "gpus_per_worker": 0}
    return Engine(**{**chosen, "retries": 2, **changed})  # type: ignore[arg-type]


def load(root: Path, seconds: float = 0.0, torch: bool = False) -> Callable[[Chore], int]:
    _meet_fate(root, "load")
    if torch:
        import torch as _  # noqa: F401 - as a module that computes would
    return functools.partial(do, seconds, torch)


def do(seconds: float, torch: bool, chore: Chore) -> int:
    with (chore.root / "log").open("a") as log:
        log.write(f"{chore.number} {os.getpid()} {os.getppid()}\n")
    time.sleep(seconds)
    _meet_fate(chore.root, str(chore.number))
    io.write_text(chore.result, f"{chore.number} {chore.number**2} {_threads() if torch else ''}")
    return chore.number


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _meet_fate(root: Path, what: str) -> None:
    for fate in ("kill", "fail", "refuse", "later", "full"):
        file = root / "fate" / f"{fate}-{what}"
        left = file.read_text().splitlines() if file.exists() else []
        if not left:
            continue
        io.write_text(file, "\n".join(left[1:]))
        if fate == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {
            "fail": ZeroDivisionError(f"{what} divided by nothing"),
            "refuse": InputError(f"{what} is no good; mend it"),
            "later": RetryableError(f"{what} does not answer"),
            "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), what),
        }[fate]


def begun(root: Path) -> list[int]:
    """The shards in the order in which they were begun."""
    log = root / "log"
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def workers(root: Path) -> list[int]:
    """The process ids that have begun a shard, the last last."""
    return [int(line.split()[1]) for line in (root / "log").read_text().splitlines()]


def parents(root: Path) -> list[int]:
    """The parents of `workers`: for an actor the raylet of its node."""
    return [int(line.split()[2]) for line in (root / "log").read_text().splitlines()]
