"""`lyrics doctor`: what this machine lacks for the chosen preset, and what to do about it."""

import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal

import psutil

from lyrics.errors import InputError
from lyrics.evaluate import captions

LOCK = Path("requirements.lock")
FOUNDATION = Path("models/foundation")
GIB = 2**30
Level = Literal["ok", "note", "missing"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """`note` costs a feature or time, `missing` stops a run. `cure` says what to do."""

    subject: str
    level: Level
    found: str
    cure: str = ""

    def __str__(self) -> str:
        sign = {"ok": "ok     ", "note": "note   ", "missing": "MISSING"}[self.level]
        return f"{sign}  {self.subject:<9} {self.found}" + (f"\n{'':20}-> {self.cure}" if self.cure else "")


def examine() -> int:
    """Print all findings; the number to exit with is 1 if something is missing."""
    findings = list(findings_for())
    print("\n".join(map(str, findings)))
    missing = sum(finding.level == "missing" for finding in findings)
    print(f"\n{missing} missing" if missing else "\nNothing is missing for this preset.")
    return 1 if missing else 0


def findings_for() -> Iterator[Finding]:
    yield check_python(sys.version_info[:3])
    yield check_packages(LOCK, is_locked=(platform.system(), platform.machine()) == ("Linux", "x86_64"))
    preset = yield from check_choices()
    yield check_threads()
    yield check_bf16()
    yield check_java(captions.has_java())
    yield check_gpu(preset)
    yield from check_weights(FOUNDATION)


def check_choices() -> Generator[Finding, None, str]:
    """The preset in params/run.yaml, and what it needs; `tiny` where that cannot be read."""
    from lyrics.compose import RUN, read_choices

    try:
        preset = str(read_choices(RUN)["preset"])
        yield from check_needs(preset)
    except InputError as error:
        yield Finding(subject="choices", level="missing", found=str(error), cure="correct what `lyrics configure` set")
        return "tiny"
    return preset


def check_python(version: tuple[int, ...]) -> Finding:
    found = ".".join(map(str, version))
    if version >= (3, 11):
        return Finding(subject="python", level="ok", found=found)
    return Finding(subject="python", level="missing", found=found, cure="install Python 3.11 or newer; make PYTHON=…")


def check_packages(lock: Path, is_locked: bool) -> Finding:
    """Installed versions against the lock, which is that of Linux on x86-64; elsewhere the ranges count."""
    if not lock.exists():
        return Finding(subject="packages", level="missing", found=f"no {lock} here", cure="run in the project's root")
    absent, other = [], []
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", lock.read_text(), re.MULTILINE):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
            continue
        if found.partition("+")[0] != version:
            other.append(f"{name} {found} instead of {version}")
    if absent and is_locked:
        return Finding(
            subject="packages", level="missing", found=f"absent: {_few(absent)}", cure="rm -r .venv; make run"
        )
    if not is_locked:
        found = f"{len(absent)} of {lock} absent, {len(other)} in other versions"
        cure = "that file is of Linux on x86-64; here the ranges of pyproject.toml count, which pip has checked"
        return Finding(subject="packages", level="note", found=found, cure=cure)
    if other:
        return Finding(subject="packages", level="note", found=_few(other), cure=f"tested is what {lock} says")
    return Finding(subject="packages", level="ok", found=f"as in {lock}")


def check_needs(preset: str) -> Iterator[Finding]:
    """Memory and disk against what `lyrics plan` computes.

    Raises:
        InputError: the configuration is not valid.
    """
    try:
        from lyrics.plan.report import needed_gib

        memory, disk = needed_gib(preset)
    except ImportError as error:
        yield Finding(subject="needs", level="note", found=f"unknown: {error}", cure="install the packages first")
        return
    yield check_disk(shutil.disk_usage(Path.cwd()).free / GIB, math.ceil(disk), preset)
    yield check_memory(psutil.virtual_memory().available / GIB, math.ceil(memory), preset)


def check_disk(free_gib: float, needed_gib: float, preset: str) -> Finding:
    found = f"{free_gib:.0f} GiB free here, {needed_gib} GiB needed for weights and checkpoints of {preset}"
    if free_gib >= needed_gib:
        return Finding(subject="disk", level="ok", found=found)
    return Finding(subject="disk", level="missing", found=found, cure="free some, e.g. with: dvc gc --workspace")


def check_memory(free_gib: float, needed_gib: float, preset: str) -> Finding:
    found = f"{free_gib:.0f} GiB available, {needed_gib} GiB needed for {preset}"
    if free_gib >= needed_gib:
        return Finding(subject="memory", level="ok", found=found)
    cure = "close other programs, or: make run overrides='stage1.accumulate=2 stage2.accumulate=2'"
    return Finding(subject="memory", level="missing", found=found, cure=cure)


def check_threads() -> Finding:
    """Processors this process may use against what OpenMP was told."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told = os.environ.get("OMP_NUM_THREADS", "")
    if told.isdigit() and int(told) < usable:
        found = f"OMP_NUM_THREADS={told} on {usable} processors"
        return Finding(subject="threads", level="note", found=found, cure="unset OMP_NUM_THREADS to use all of them")
    if usable < 2:
        return Finding(
            subject="threads", level="note", found="1 processor", cure="expect twice the time stated for two"
        )
    return Finding(subject="threads", level="ok", found=f"{usable} processors")


def check_bf16() -> Finding:
    """What `precision: auto` finds on this machine."""
    try:
        import torch

        from lyrics.numerics import has_native_bf16
    except ImportError as error:
        return Finding(subject="bf16", level="note", found=f"unknown: {error}", cure="install the packages first")
    if has_native_bf16(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        return Finding(subject="bf16", level="ok", found="products in bf16")
    cure = "precision auto computes in fp32 here: training takes a multiple of the times stated"
    return Finding(subject="bf16", level="note", found="the processor has no products in bf16", cure=cure)


def check_java(starts: bool) -> Finding:
    if starts:
        return Finding(subject="java", level="ok", found=shutil.which("java") or "")
    cure = "caption scores use the built-in tokenizer and METEOR is absent; a Java runtime on PATH changes that"
    return Finding(subject="java", level="note", found="none", cure=cure)


def check_gpu(preset: str) -> Finding:
    try:
        import torch
    except ImportError as error:
        return Finding(subject="gpu", level="note", found=f"unknown: {error}", cure="install the packages first")
    if torch.cuda.is_available():
        count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
        return Finding(subject="gpu", level="ok", found=f"{count} x {name}")
    seen = _nvidia_smi()
    if seen:
        found = f"{seen}, but torch {torch.__version__} cannot use it"
        return Finding(subject="gpu", level="note", found=found, cure="install the torch build for your CUDA driver")
    level: Level = "missing" if preset == "paper" else "note"
    cure = "preset paper needs GPUs; tiny and laptop do without" if preset == "paper" else "not needed for this preset"
    return Finding(subject="gpu", level=level, found="none", cure=cure)


def _nvidia_smi() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        ran = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "a driver that does not answer"
    return ran.stdout.splitlines()[0] if ran.returncode == 0 and ran.stdout else ""


def check_weights(folder: Path) -> Iterator[Finding]:
    """The frozen parts that are here, by their manifests."""
    from lyrics.foundation import manifest

    manifests = sorted(folder.glob("*/manifest.json"))
    if not manifests:
        yield Finding(
            subject="weights", level="note", found=f"none in {folder} yet", cure="make run fits or fetches them"
        )
    for file in manifests:
        try:
            manifest.verify(file.parent)
        except InputError as error:
            yield Finding(subject="weights", level="missing", found=str(error), cure="dvc checkout, or dvc repro")
        else:
            yield Finding(subject="weights", level="ok", found=f"{file.parent} is as its manifest says")


def _few(items: list[str], shown: int = 4) -> str:
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return ", ".join(items[:shown]) + more
