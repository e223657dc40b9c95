"""Worker processes on this machine. A killed one is replaced, and the shard it had at hand is handed back."""

import contextlib
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

from lyrics.engine_worker import Failure, WorkerLostError, attempt, begin
from lyrics.errors import InputError
from lyrics.process import die_with_parent

if TYPE_CHECKING:
    from lyrics.config import Engine

_CONTEXT = multiprocessing.get_context("spawn")  # a fork copies the locks of torch's threads, held
_PARTING_SECONDS = 5.0


def outcomes(settings: "Engine", load: bytes, waiting: deque) -> Iterator[tuple[Any, Any]]:
    """As `engine._outcomes`."""
    count = min(settings.workers, len(waiting))
    devices = [gpus_of(number, settings.gpus_per_worker) for number in range(count)]
    pool = [_Worker(load, settings.threads_per_worker, device) for device in devices]
    try:
        while waiting or any(worker.has_shard for worker in pool):
            for worker in pool:
                if worker.is_idle and waiting:
                    worker.give(waiting.popleft())
            answering = connection.wait([worker.pipe for worker in pool])
            for number, worker in enumerate(pool):
                if worker.pipe not in answering:
                    continue
                had_shard, shard, result = worker.has_shard, worker.shard, worker.answer()
                if worker.is_lost:
                    worker.end()
                    pool[number] = _Worker(load, settings.threads_per_worker, devices[number])
                if had_shard or isinstance(result, Failure):
                    yield shard, result
    finally:
        for worker in pool:
            worker.end()


class _Worker:
    """A process and the pipe to it. It begins by loading, then waits for shards."""

    def __init__(self, load: bytes, threads: int, gpus: str | None) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, load, threads, gpus), daemon=True)
        self.process.start()
        theirs.close()
        self.shard: Any = None
        self.has_shard = self.is_idle = self.is_lost = False

    def give(self, shard: Any) -> None:
        self.shard, self.has_shard, self.is_idle = shard, True, False
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead: its pipe will say so
            self.pipe.send(shard)

    def answer(self) -> Any:
        """What it says about its shard, or about loading where it has none; afterwards it is idle or lost."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            result = Failure(WorkerLostError(f"its process {self.process.pid} {_ending(self.process.exitcode)}"))
            self.is_lost = True
        self.is_lost |= isinstance(result, Failure) and not self.has_shard
        self.shard, self.has_shard, self.is_idle = None, False, not self.is_lost
        return result

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join(_PARTING_SECONDS)


def _serve(pipe: connection.Connection, load: bytes, threads: int, gpus: str | None) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends its workers
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    do = attempt(begin, load, threads)
    with contextlib.suppress(EOFError, BrokenPipeError):  # the driver has what it needs
        pipe.send(do if isinstance(do, Failure) else None)
        while not isinstance(do, Failure):
            pipe.send(attempt(do, pipe.recv()))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def gpus_of(number: int, per_worker: float) -> str | None:
    """CUDA_VISIBLE_DEVICES of a worker: the next whole GPUs, or the one that a fraction falls on. None: as it is.

    Raises:
        InputError: this machine has no such GPU.
    """
    if not per_worker:
        return None
    count = max(1, int(per_worker))
    first = number * count if per_worker >= 1 else number // int(1 / per_worker + 1e-6)
    visible = _visible_gpus()
    if first + count > len(visible):
        raise InputError(
            f"engine.workers and engine.gpus_per_worker ask for GPU number {first + count}, but this machine has "
            f"{len(visible)}; lower one of them"
        )
    return ",".join(visible[first : first + count])


def _visible_gpus() -> list[str]:
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name for name in told.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
