"""Workers as actors on a Ray cluster. One that is lost with its process or its node is replaced where there is room."""

import contextlib
import importlib.util
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import psutil

from lyrics.engine_worker import Failure, WorkerLostError
from lyrics.errors import InputError, RetryableError
from lyrics.process import end_with_me

if TYPE_CHECKING:
    from lyrics.config import Engine

_ANSWER_SECONDS = 5.0
_POLL_SECONDS = 1.0
_NO_WORKER_SECONDS = 300.0
_OBJECT_STORE_BYTES = 100 * 2**20  # of a local cluster: nothing but shards' descriptions goes through it
_LOADING = object()


def outcomes(settings: "Engine", load: bytes, waiting: deque) -> Iterator[tuple[Any, Any]]:
    """As `engine._outcomes`."""
    with _cluster(settings) as ray:
        kind = ray.remote(_worker_class()).options(
            num_cpus=settings.threads_per_worker,
            num_gpus=settings.gpus_per_worker,
            max_restarts=0,  # a new actor is started here, which knows that it has to load
            scheduling_strategy="SPREAD",
        )
        at_work: dict[Any, tuple[Any, Any]] = {}  # what is awaited: the actor, and its shard or _LOADING
        idle: list[Any] = []

        def start() -> None:
            actor = kind.remote(sys.path, str(Path.cwd()))
            at_work[actor.begin.remote(load, settings.threads_per_worker)] = (actor, _LOADING)

        for _ in range(min(settings.workers, len(waiting))):
            start()
        seen_at = time.monotonic()
        while waiting or any(shard is not _LOADING for _, shard in at_work.values()):
            while idle and waiting:
                actor, shard = idle.pop(), waiting.popleft()
                at_work[actor.do.remote(shard)] = (actor, shard)
            ready, _ = ray.wait(list(at_work), num_returns=1, timeout=_POLL_SECONDS)
            if any(shard is not _LOADING for _, shard in at_work.values()) or ready:
                seen_at = time.monotonic()
            elif time.monotonic() - seen_at > _NO_WORKER_SECONDS:
                raise RetryableError(
                    f"no node of the Ray cluster had room for a worker for {_NO_WORKER_SECONDS:.0f} s; add nodes"
                )
            for reference in ready:
                actor, shard = at_work.pop(reference)
                result = _result(ray, reference)
                failed_to_begin = shard is _LOADING and isinstance(result, Failure)
                if failed_to_begin or _is_lost(result):
                    ray.kill(actor)
                    start()
                else:
                    idle.append(actor)
                if shard is not _LOADING or failed_to_begin:
                    yield (None if shard is _LOADING else shard), result


def _result(ray: ModuleType, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        said = " ".join(str(error).split())
        return Failure(WorkerLostError(f"{type(error).__name__}: {said[:500]}"))


def _is_lost(result: Any) -> bool:
    return isinstance(result, Failure) and isinstance(result.error, WorkerLostError)


def _worker_class() -> type:
    """Made in a function, so that Ray sends its code: a node need not find this package before it is told where."""

    class Worker:
        def __init__(self, paths: list[str], folder: str) -> None:
            import os
            import sys

            os.chdir(folder)
            sys.path[:0] = [path for path in paths if path not in sys.path]

        def begin(self, load: bytes, threads: int) -> Any:
            from lyrics import engine_worker

            self._do = engine_worker.attempt(engine_worker.begin, load, threads)
            return self._do if isinstance(self._do, engine_worker.Failure) else None

        def do(self, shard: Any) -> Any:
            from lyrics import engine_worker

            return engine_worker.attempt(self._do, shard)

    return Worker


@contextlib.contextmanager
def _cluster(settings: "Engine") -> Iterator[ModuleType]:
    """Ray, connected to the cluster that is named, or to one of our own that ends with this."""
    ray = _import_ray(own_cluster=settings.address is None)
    with contextlib.ExitStack() as stack:
        if settings.address is None:
            options = _own_cluster(settings, stack.enter_context(_scratch()))
        else:
            _check_answers(settings.address)
            options = {"address": settings.address}
        stack.callback(ray.shutdown)
        try:
            ray.init(**options, logging_level="ERROR", namespace="lyrics")
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise RetryableError(f"Ray at {settings.address or 'this machine'} cannot be used: {said[:500]}") from None
        if settings.address is None:
            _guard_agents()
        _check_room(ray, settings)
        yield ray


def _guard_agents() -> None:
    """Should this process be killed, the kernel ends Ray's daemons with it, but not the agents that they started."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "agent" in " ".join(process.cmdline()).lower():
                end_with_me(process)


def _import_ray(own_cluster: bool) -> ModuleType:
    """Ray with all that it does unasked switched off; it reads most of this when it is imported."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            "engine.kind is ray, but the package ray is not installed here; pip install -e '.[ray]', or choose "
            "engine=local"
        )
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a worker without GPUs of its own sees none
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if own_cluster:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on every system: stay on the loopback interface
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one into the home folder
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray

    return ray


def _own_cluster(settings: "Engine", scratch: Path) -> dict[str, Any]:
    return {
        "address": "local",
        "num_cpus": settings.workers * settings.threads_per_worker,
        "num_gpus": math.ceil(settings.workers * settings.gpus_per_worker),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "_temp_dir": str(scratch),
    }


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for sockets and logs: in the system's own, because the path of a socket may have 107 bytes only."""
    for left in Path(tempfile.gettempdir()).glob("lyrics-ray-*"):
        pid = left.name.split("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):  # of a driver that was killed
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"lyrics-ray-{os.getpid()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RetryableError(
            f"no Ray cluster answers at {address} ({error}); start its head with `ray start --head`, or correct "
            "engine.address"
        ) from None


def _check_room(ray: ModuleType, settings: "Engine") -> None:
    needed = {"CPU": settings.threads_per_worker, "GPU": settings.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(kind, 0) >= amount for kind, amount in needed.items()) for node in nodes):
        largest = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes)
        raise InputError(
            f"a worker needs {needed['CPU']} CPU and {needed['GPU']:g} GPU, but the nodes of the Ray cluster have "
            f"{largest}; lower engine.threads_per_worker or engine.gpus_per_worker"
        )
