"""What every stage needs around its work: a folder to resume in, a lock, a token, an atomic end, clear exit codes."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import filelock
import yaml

from lyrics import dag, io
from lyrics.errors import InputError, RetryableError
from lyrics.process import die_with_parent

WORK = Path("build/work")
TOKENS = Path("build/tokens")
EXIT_INPUT, EXIT_RETRY, EXIT_INTERRUPTED = 2, 75, 130  # 75 is EX_TEMPFAIL of sysexits.h
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# Libraries that write by themselves report a full disk in words only.
_FULL_WORDS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "database or disk is full",
    "file write failed",
    *(f"os error {code}" for code in _FULL),
)


class Tracker(Protocol):
    """Where a stage reports what it did."""

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None: ...
    def log_params(self, values: dict[str, object]) -> None: ...
    def log_artifact(self, path: Path) -> None: ...
    def log_dataset(self, name: str, path: Path, sha256: str) -> None: ...


class NullTracker:
    """Reports to nobody."""

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None: ...
    def log_params(self, values: dict[str, object]) -> None: ...
    def log_artifact(self, path: Path) -> None: ...
    def log_dataset(self, name: str, path: Path, sha256: str) -> None: ...


def token(name: str) -> Path:
    """The file that a verb leaves when it starts: whoever called DVC learns from it that the stage really ran."""
    return TOKENS / name


def leave_token(name: str) -> None:
    io.write_text(token(name), "")


def run_stage(name: str, body: Callable[[Path], None]) -> None:
    """Run `body(work)`, then rename `work/out` to the output that dvc.yaml names for stage `name`.

    `work` is the same folder again for the same inputs, so that a killed stage resumes there; `work/out` starts empty.

    Raises:
        InputError: an input is absent, or another process runs this stage.
    """
    stage = _spec(name)
    die_with_parent()
    with _locked(name):
        leave_token(name)
        work = WORK / name / fingerprint(stage)
        for other in (WORK / name).glob("*"):
            if other != work:
                shutil.rmtree(other, ignore_errors=True)
        out = work / "out"
        shutil.rmtree(out, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        body(work)
        if not out.exists():
            raise RuntimeError(f"stage {name} ended without writing {out}")
        io.publish(out, Path(stage.outs[0]))
        shutil.rmtree(WORK / name, ignore_errors=True)


def _spec(name: str) -> dag.Stage:
    stages = dag.read()
    if name not in stages:
        raise InputError(f"dvc.yaml has no stage {name}; choices: {', '.join(stages)}")
    return stages[name]


@contextlib.contextmanager
def _locked(name: str) -> Iterator[None]:
    lock = WORK / f"{name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(lock, blocking=False))
        except filelock.Timeout:
            raise InputError(
                f"stage {name} is already running in this folder; wait for it to end, or stop it"
            ) from None
        yield


def fingerprint(stage: dag.Stage) -> str:
    """16 hex digits of what the stage reads: code by bytes, other files by name, size and time, parameters by value."""
    digest = hashlib.sha256(stage.name.encode())
    for dep in stage.deps:
        root = Path(dep)
        if not root.exists():
            raise InputError(
                f"stage {stage.name} reads {dep}, which does not exist; run the whole pipeline with: dvc repro"
            )
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if "__pycache__" in file.parts or not file.is_file():
                continue
            status = file.stat()
            content = io.sha256_file(file) if file.suffix == ".py" else f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{file.as_posix()}\0{content}\n".encode())
    for file_name, keys in stage.params.items():
        values = yaml.safe_load(Path(file_name).read_text())
        chosen = {key: dag.lookup(values, key) for key in keys}
        digest.update(json.dumps(chosen, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def is_full_disk(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a disk, quota or file-size limit that was reached."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def one_sentence(debug: bool = False) -> Iterator[None]:
    """Turn failures into an exit code and, where the user can mend them, one sentence instead of a traceback."""
    debug = debug or bool(os.environ.get("LYRICS_DEBUG"))
    try:
        yield
    except KeyboardInterrupt:
        code, message = EXIT_INTERRUPTED, ""
    except InputError as error:
        code, message = EXIT_INPUT, str(error)
        _trace(debug)
    except RetryableError as error:
        code, message = EXIT_RETRY, f"{error} (this may pass: run the same command again)"
        _trace(debug)
    except Exception as error:
        if not is_full_disk(error):
            raise
        code = 1
        message = f"The disk or a size limit is full ({error}); free some space and run the same command again."
        _trace(debug)
    else:
        return
    if message:
        print(f"lyrics: {message}", file=sys.stderr)
    raise SystemExit(code)


def _trace(debug: bool) -> None:
    if debug:
        traceback.print_exc()
