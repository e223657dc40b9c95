"""Do shards of data: in this process, in several of this machine, or on a Ray cluster, always to the same bytes.

A shard is a description that can be pickled; doing it reads files and writes one file or folder under its final name,
atomically. So whatever dies, a shard is whole or absent, and who starts again does what is absent.
"""

import collections
import contextlib
import dataclasses
import pickle
import time
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from lyrics import engine_processes
from lyrics.engine_worker import Do, Failure, attempt, threads_here
from lyrics.errors import InputError, RetryableError
from lyrics.stage import Tracker

if TYPE_CHECKING:
    from lyrics.config import Engine

S = TypeVar("S")
Outcomes = Generator[tuple[Any, int | Failure], None, None]
_LOG_SECONDS = 5.0
_SEEN_SECONDS = 20.0  # a network file system may show a new file to others only after seconds


def run_shards(
    settings: "Engine",
    load: Callable[[], Callable[[S], int]],
    shards: Sequence[S],
    *,
    done: Callable[[S], bool],
    name: str,
    tracker: Tracker,
) -> None:
    """Do every shard for which `done` does not hold yet; afterwards it holds for all.

    Args:
        load: called once in each worker, where it loads models; returns the function that does one shard, which says
            how many images were in it. Picklable: a `functools.partial` of a module's function.
        shards: picklable; `str(shard)` is the name that errors show.
        done: whether the result of a shard is there.
        name: of the pass, in progress, metrics and errors.

    Raises:
        InputError: from a worker; or what a worker wrote is not seen here.
        RetryableError: Ray does not answer, or the last error of a shard was one.
        RuntimeError: a shard failed more than `settings.retries` times; names it and the worker's error.
    """
    waiting = collections.deque(shard for shard in shards if not done(shard))
    tracker.log_params({"engine": dataclasses.asdict(settings)})
    failures: collections.Counter[str] = collections.Counter()
    with (
        _Progress(name, tracker, len(shards), len(shards) - len(waiting)) as progress,
        contextlib.closing(_outcomes(settings, load, waiting)) as outcomes,
    ):
        for shard, result in outcomes:
            if isinstance(result, Failure):
                _count(failures, shard, result, settings.retries, name)
                if shard is not None:
                    waiting.append(shard)
            else:
                _see(done, shard, name)
                failures.pop(_LOADING, None)
                progress.add(result)


_LOADING = "loading, before its first shard,"


def _outcomes(settings: "Engine", load: Callable[[], Do], waiting: collections.deque) -> Outcomes:
    """Takes shards from `waiting` until it is empty and none is at work; yields each with what became of it.

    The shard is None where a worker failed before it had one.
    """
    if not waiting:
        return
    if settings.kind == "ray":
        from lyrics import engine_ray

        yield from engine_ray.outcomes(settings, pickle.dumps(load), waiting)
    elif settings.workers == 1:
        yield from _here(settings, load, waiting)
    else:
        yield from engine_processes.outcomes(settings, pickle.dumps(load), waiting)


def _here(settings: "Engine", load: Callable[[], Do], waiting: collections.deque) -> Outcomes:
    """One worker is this process: no second one to start, but nobody to go on if it is killed."""
    with threads_here(settings.threads_per_worker):
        do = load()
        while waiting:
            shard = waiting.popleft()
            yield shard, attempt(do, shard)


def _count(failures: collections.Counter[str], shard: Any, failure: Failure, retries: int, name: str) -> None:
    """Remember a failure; raise where trying again makes no sense, or was tried often enough."""
    what = _LOADING if shard is None else f"shard {shard}"
    failures[what] += 1
    error = failure.error
    if failure.is_permanent:
        raise error
    again = failures[what] <= retries
    said = f"{name}: {what} failed in attempt {failures[what]} of {retries + 1}: {type(error).__name__}: {error}"
    if again:
        tqdm.write(f"{said}; it is tried again")
    elif isinstance(error, RetryableError):
        raise RetryableError(said) from error
    else:
        raise RuntimeError(f"{said}\n{failure.trace}".rstrip()) from error


def _see(done: Callable[[S], bool], shard: S, name: str) -> None:
    deadline = time.monotonic() + _SEEN_SECONDS
    while not done(shard):
        if time.monotonic() > deadline:
            raise InputError(
                f"{name}: a worker says that it wrote shard {shard}, but it is not here; all nodes of a cluster must "
                "have the project's folder in common, at the same path"
            )
        time.sleep(0.1)


class _Progress:
    """Shards, images per second and the time that is left: a bar in the terminal, the same as metrics.

    What an earlier run did counts as done, but not for the speed.
    """

    def __init__(self, name: str, tracker: Tracker, shards: int, done: int) -> None:
        self.name, self.tracker = name, tracker
        self.bar = tqdm(total=shards, initial=done, desc=name, unit="shard")
        self.before, self.images = done, 0
        self.started = self.logged = time.monotonic()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, images: int) -> None:
        self.images += images
        self.bar.update()
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        self.bar.set_postfix_str(f"{self.images / seconds:.1f} images/s")
        if now - self.logged < _LOG_SECONDS and self.bar.n < self.bar.total:
            return
        self.logged = now
        values = {
            "shards": self.bar.n,
            "shards_total": self.bar.total,
            "images_per_s": self.images / seconds,
            "eta_s": (self.bar.total - self.bar.n) * seconds / (self.bar.n - self.before),
        }
        self.tracker.log_metrics({f"{self.name}/{key}": float(value) for key, value in values.items()}, self.bar.n)
