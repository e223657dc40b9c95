"""Memory of a program and of all processes that it starts, seen from outside."""

import json
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

_EVERY_SECONDS = 0.5


def watched(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a program that prints one JSON object, and add what it took to what it says.

    `pss_bytes` is the most that its processes held together, pages that they share counted once. `high_water_bytes` is
    the sum of the highest resident sets that processes living at one time ever had: no short peak escapes it, shared
    pages count in each.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    peaks = {"pss_bytes": 0, "high_water_bytes": 0}
    with tempfile.TemporaryFile("w+") as said:
        program = subprocess.Popen(command, cwd=folder, env=dict(environment), stdout=said, text=True)
        while program.poll() is None:
            for name, value in _memory(program.pid).items():
                peaks[name] = max(peaks[name], value)
            time.sleep(_EVERY_SECONDS)
        if program.returncode:
            raise subprocess.CalledProcessError(program.returncode, list(command))
        said.seek(0)
        return {**json.loads(said.read().splitlines()[-1]), **peaks}


def _memory(pid: int) -> dict[str, int]:
    both = {"pss_bytes": 0, "high_water_bytes": 0}
    try:
        tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return both
    for one in tree:
        both["pss_bytes"] += pss_bytes(one)
        both["high_water_bytes"] += _field(one, "status", "VmHWM:")
    return both


def pss_bytes(pid: int) -> int:
    """What a process holds now; a page that n processes share counts one nth."""
    return _field(pid, "smaps_rollup", "Pss:")


def _field(pid: int, file: str, name: str) -> int:
    """Bytes; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
