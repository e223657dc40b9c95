"""Atomic writes and content hashes: what is under its final name is always whole."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private; an out is as readable as any other file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def dump_json(value: Any) -> str:
    """JSON with sorted keys and a final newline, so that equal values are equal bytes. NaN is refused."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    write_text(path, dump_json(value))


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_bytes())


def sha256_file(path: Path) -> str:
    with Path(path).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_tree(*roots: Path) -> str:
    """One hash over the relative names and contents of all files below `roots` (files or folders)."""
    digest = hashlib.sha256()
    for root in roots:
        root = Path(root)
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
        for file in files:
            name = file.name if file == root else file.relative_to(root).as_posix()
            digest.update(f"{name}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def link_or_copy(source: Path, destination: Path) -> None:
    """The same content under a second name: a hard link, or a copy where the file system has none."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def publish(finished: Path, destination: Path) -> None:
    """Rename the folder `finished` into place; what stood there before is moved aside first, then removed.

    Onto another file system (a mounted `data/`) it is copied, beside its place at first.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    aside, beside = (destination.with_name(f".{destination.name}.{end}") for end in ("old", "new"))
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        finished.replace(beside)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(finished, beside)
    if destination.exists():
        destination.replace(aside)
    beside.replace(destination)
    shutil.rmtree(aside, ignore_errors=True)
