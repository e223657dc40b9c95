"""Stages of dvc.yaml through DVC, which alone decides what has to run: status, one stage, and what became of it."""

import codecs
import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Literal

import yaml

from lyrics import dag, stage
from lyrics.errors import InputError
from lyrics.process import kill_tree

How = Literal["ran", "unchanged", "restored from the run cache"]
LOCK_FILE = Path("dvc.lock")
PROGRESS_SECONDS = 15.0
_GRACE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    stage: str
    how: How
    seconds: float


class StageError(Exception):
    """A stage ended badly; the message is the sentence for the user."""

    def __init__(self, name: str, code: int, sentence: str) -> None:
        super().__init__(name, code, sentence)  # all three, so that it survives pickling
        self.name, self.code, self.sentence = name, code, sentence

    @property
    def retryable(self) -> bool:
        return self.code == stage.EXIT_RETRY

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"


def stale() -> set[str]:
    """Names of the stages that DVC finds changed, with all that depend on them: their inputs may change yet."""
    ran = subprocess.run(
        dvc_command("status", "--json"), env=environment(), capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise StageError("dvc status", 1, _error(ran.stderr.splitlines()))
    stages = dag.read()
    found = set(json.loads(ran.stdout or "{}")) & set(stages)
    for name, one in stages.items():  # upstream first
        if found.intersection(dag.upstream(one, stages)):
            found.add(name)
    return found


def reproduce(name: str, log: Callable[[str], None], timeout_seconds: float) -> Outcome:
    """Let DVC bring one stage up to date; everything upstream must be.

    Raises:
        StageError: with the verb's own sentence, where it gave one.
    """
    token, before = stage.token(name), _state(name)
    token.unlink(missing_ok=True)
    started = time.monotonic()
    lines: list[str] = []

    def keep(line: str) -> None:
        lines.append(line)
        log(line)

    code = stream(dvc_command("repro", "--quiet", "--single-item", name), keep, timeout_seconds)
    seconds = time.monotonic() - started
    if code is None:
        raise StageError(name, 1, f"stopped after its time-out of {timeout_seconds:.0f} s")
    if code:
        raise _failure(name, token, lines)
    if token.exists():
        stage.forget(name)
        return Outcome(stage=name, how="ran", seconds=seconds)
    how: How = "unchanged" if _state(name) == before else "restored from the run cache"
    return Outcome(stage=name, how=how, seconds=seconds)


def stream(command: Sequence[str], log: Callable[[str], None], timeout_seconds: float) -> int | None:
    """Run a command, its output going line by line to `log` and its progress bars to the terminal.

    Returns:
        Its exit code; None past the time-out. Then, and when interrupted, it and all below it are ended.
    """
    process = subprocess.Popen(
        command, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        if not _pump(process.stdout, Output(log), time.monotonic() + timeout_seconds):
            return None
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):  # Ctrl-C reached it as well: it may end in its own way
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.wait()
        process.stdout.close()


class Output:
    """Splits what a process prints into lines for the log and progress (ended by a carriage return) for the terminal.

    Where there is no terminal, the latest progress goes to the log now and then.
    """

    def __init__(self, log: Callable[[str], None], terminal: IO[str] | None = None) -> None:
        self._log = log
        self._terminal = terminal or (sys.stderr if sys.stderr.isatty() else None)
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""
        self._shown = time.monotonic()

    def feed(self, content: bytes) -> None:
        *lines, self._rest = (self._rest + self._decode(content)).split("\n")
        for line in lines:
            self._line(line.rstrip("\r").rpartition("\r")[2])
        if "\r" in self._rest:
            self._rest = self._rest[self._rest.rstrip("\r").rfind("\r") + 1 :]
            self._progress(self._rest.strip("\r"))

    def close(self) -> None:
        self._line(self._rest.strip("\r"))

    def _line(self, line: str) -> None:
        if self._terminal:
            self._terminal.write("\r\x1b[K")
        if line.strip():
            self._log(line)

    def _progress(self, text: str) -> None:
        if self._terminal:
            self._terminal.write(f"\r\x1b[K{text}")
            self._terminal.flush()
        elif time.monotonic() - self._shown > PROGRESS_SECONDS:
            self._shown = time.monotonic()
            self._log(text)


def _pump(source: IO[bytes], output: Output, deadline: float) -> bool:
    """Read until the end (True) or the deadline (False)."""
    with selectors.DefaultSelector() as ready:
        ready.register(source, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if ready.select(min(left, 1.0)):
                content = os.read(source.fileno(), 65536)
                if not content:
                    output.close()
                    return True
                output.feed(content)
    return False


def environment() -> dict[str, str]:
    """Commands of dvc.yaml say `python`: it must be this one."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def dvc_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "lyrics.process", "dvc", *arguments]


def need_remote() -> None:
    """
    Raises:
        InputError: DVC does not know where to push to.
    """
    asked = subprocess.run(dvc_command("config", "core.remote"), capture_output=True, text=True)
    if asked.returncode or not asked.stdout.strip():
        raise InputError(
            "push=true, but DVC has no default remote; name one with: dvc remote add --default store FOLDER"
        )


def _state(name: str) -> object:
    """What changes when DVC restores a stage: its entry in dvc.lock, or its outputs themselves."""
    entry: Mapping[str, object] = {}
    if LOCK_FILE.exists():
        entry = (yaml.safe_load(LOCK_FILE.read_text()) or {}).get("stages", {}).get(name, {})
    return entry, [_stamp(Path(out)) for out in dag.read()[name].outs]


def _stamp(path: Path) -> tuple[int, int] | None:
    if not path.exists():
        return None
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _failure(name: str, token: Path, lines: Sequence[str]) -> StageError:
    said = token.read_text() if token.exists() else None
    if said:
        code, _, sentence = said.partition(" ")
        return StageError(name, int(code), sentence)
    printed = _own_sentence(lines)
    if printed:  # a full disk has no room for the token either
        return StageError(name, 1, printed)
    error = _error(lines)
    if said == "" and not stage.is_full_disk(OSError(error)):
        return StageError(name, 1, "its process was killed; what it had finished is kept: run the same command again")
    return StageError(name, 1, error)


def _own_sentence(lines: Sequence[str]) -> str | None:
    """With which a verb ended, if it had one."""
    return next((line.removeprefix("lyrics: ") for line in reversed(lines) if line.startswith("lyrics: ")), None)


def _error(lines: Sequence[str]) -> str:
    """DVC's own sentence among what it printed."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    said = (errors or [line for line in lines if line.strip()] or ["DVC failed and said nothing"])[0]
    if stage.is_full_disk(OSError(said)):
        return stage.full_disk(said)
    why = said.partition("[Errno ")[2]  # DVC wraps what the system said
    if why.partition("]")[0] in map(str, stage.FORBIDDEN):
        return stage.no_permission(why.partition("] ")[2])
    return said
