"""What every stage needs around its work: a folder to resume in, a lock, a token, an atomic end, clear exit codes."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import filelock

from lyrics import dag, io
from lyrics.errors import InputError, RetryableError
from lyrics.process import die_with_parent, keep_freed_memory

WORK = Path("build/work")
TOKENS = Path("build/tokens")
EXIT_INPUT, EXIT_RETRY, EXIT_INTERRUPTED = 2, 75, 130  # 75 is EX_TEMPFAIL of sysexits.h
MAY_PASS = " (this may pass: run the same command again)"
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}
# Libraries that write by themselves report a full disk in words only: Rust's, sqlite's, torch's and numpy's.
_FULL_WORDS = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|database or disk is full|file write failed"
    rf"|os error ({'|'.join(map(str, sorted(_FULL)))})\b|\d+ requested and \d+ written"
)


class Tracker(Protocol):
    """Where a stage reports what it did."""

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None: ...
    def log_params(self, values: Mapping[str, object]) -> None: ...
    def log_artifact(self, path: Path) -> None: ...
    def log_dataset(self, name: str, path: Path, sha256: str) -> None: ...


class NullTracker:
    """Reports to nobody."""

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None: ...
    def log_params(self, values: Mapping[str, object]) -> None: ...
    def log_artifact(self, path: Path) -> None: ...
    def log_dataset(self, name: str, path: Path, sha256: str) -> None: ...


def token(name: str) -> Path:
    """The file that a verb leaves when it starts: whoever called DVC learns from it that the stage really ran.

    It is empty, or holds the exit code and the sentence with which the verb failed.
    """
    return TOKENS / name


@contextlib.contextmanager
def leaving_token(name: str) -> Iterator[None]:
    io.write_text(token(name), "")
    try:
        yield
    except Exception as error:
        code, sentence = verdict(error)
        with contextlib.suppress(OSError):  # the disk may be full; the first failure is the one to report
            io.write_text(token(name), f"{code} {sentence}")
        raise


def run_stage(name: str, body: Callable[[Path], None]) -> None:
    """Run `body(work)`, which writes `work/out`, and put that in the place that dvc.yaml names for stage `name`.

    `work` is the same folder again for the same inputs, so that a killed stage resumes there; `work/out` starts empty.
    The finished result stays in `work`, as hard links, until the stage is seen to be in dvc.lock: DVC killed before it
    wrote that would otherwise throw away what is finished.

    Raises:
        InputError: an input is absent, or another process runs this stage.
    """
    stage = _spec(name)
    die_with_parent()
    keep_freed_memory()
    with locked(name), leaving_token(name):
        work = WORK / name / fingerprint(stage)
        _keep_only(work)
        out, finished = work / "out", work / "finished"
        if finished.exists() and _in_lock_file(name):  # whoever asks again now wants it done again
            shutil.rmtree(work)
        if not finished.exists():
            shutil.rmtree(out, ignore_errors=True)
            work.mkdir(parents=True, exist_ok=True)
            body(work)
            if not out.is_dir():
                raise RuntimeError(f"stage {name} ended without writing the folder {out}")
            out.rename(finished)
        _publish(finished, Path(stage.outs[0]))
        for rest in work.iterdir():
            if rest != finished:
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()


def forget(name: str) -> None:
    """Remove the work folder of a stage that DVC has recorded."""
    shutil.rmtree(WORK / name, ignore_errors=True)


def _keep_only(work: Path) -> None:
    for other in work.parent.glob("*"):
        if other != work:
            shutil.rmtree(other, ignore_errors=True)


def _publish(finished: Path, destination: Path) -> None:
    copy = finished.with_name("publish")
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(finished, copy, copy_function=os.link)
    except (OSError, shutil.Error):  # a file system without hard links: nothing is kept
        shutil.rmtree(copy, ignore_errors=True)
        copy = finished
    io.publish(copy, destination)


def _in_lock_file(name: str) -> bool:
    """Whether dvc.lock holds this stage with the inputs that are here now. Slow: imports DVC."""
    from dvc.repo import Repo

    with Repo() as repo:
        return not any(dep.status() for dep in repo.stage.load_one(name=name).deps)


def _spec(name: str) -> dag.Stage:
    stages = dag.read()
    if name not in stages:
        raise InputError(f"dvc.yaml has no stage {name}; choices: {', '.join(stages)}")
    return stages[name]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock of a stage; InputError where another process holds it."""
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
        again = "write it again with: python -m lyrics compose"
        values = dag.read_yaml(Path(file_name), again)
        try:
            chosen = {key: dag.lookup(values, key) for key in keys}
        except (KeyError, TypeError):
            raise InputError(f"{file_name} lacks a key that stage {stage.name} reads; {again}") from None
        digest.update(json.dumps(chosen, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def no_permission(why: str) -> str:
    return f"a file or folder may not be read or written ({why}); give yourself permission, or name another"


def full_disk(why: str) -> str:
    return f"the disk, a quota or a size limit is full ({why}); free some space and run the same command again"


def is_forbidden(error: BaseException) -> bool:
    """Whether `error` says that the user may not read or write something."""
    return isinstance(error, OSError) and error.errno in FORBIDDEN


def is_full_disk(error: BaseException | None) -> bool:
    """Whether `error`, or what caused it, is a disk, quota or file-size limit that was reached."""
    return _why_full(error) is not None


def _why_full(error: BaseException | None) -> str | None:
    """What was said where it began: libraries wrap it in sentences of their own."""
    why = None
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (isinstance(error, OSError) and error.errno in _FULL) or _FULL_WORDS.search(str(error)):
            why = str(error)
        error = error.__cause__ or error.__context__
    return why


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and, where the user can mend it, the sentence to show instead of a traceback."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, ""
    if isinstance(error, InputError):
        return EXIT_INPUT, str(error)
    why = _why_full(error)
    if why is not None:
        return 1, full_disk(why)
    if is_forbidden(error):
        return EXIT_INPUT, no_permission(str(error))
    if isinstance(error, RetryableError):
        return EXIT_RETRY, f"{error}{MAY_PASS}"
    return 1, f"{type(error).__name__}: {error}"


def has_sentence(error: BaseException) -> bool:
    """Whether the sentence of `verdict` is enough, so that nobody needs a traceback."""
    known = isinstance(error, KeyboardInterrupt | InputError | RetryableError | FloatingPointError)
    return known or is_full_disk(error) or is_forbidden(error)


@contextlib.contextmanager
def one_sentence(debug: bool = False) -> Iterator[None]:
    """End the process with an exit code and one sentence where that is enough; other errors keep their traceback."""
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        code, sentence = verdict(error)
        if not has_sentence(error) or debug or os.environ.get("LYRICS_DEBUG"):
            traceback.print_exc()
        elif sentence:
            print(f"lyrics: {sentence}", file=sys.stderr)
        raise SystemExit(code) from None
