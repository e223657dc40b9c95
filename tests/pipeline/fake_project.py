"""A small project with three fake stages, run by the real machinery in real processes."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
FOLDER = "lyrics/world"
DVC_YAML = """
vars:
  - params/run.yaml:folder
stages:
  compose:
    cmd: python fake.py compose
    deps: [params]
    outs: [build/config.yaml]
  first:
    cmd: python fake.py first
    deps: ["${folder}"]
    params:
      - build/config.yaml: [seed]
    outs: [data/first]
  second:
    cmd: python fake.py second
    deps: [data/first]
    params:
      - build/config.yaml: [stage2.steps]
    outs: [models/second]
"""
# `first` writes ten numbered parts, `seconds` apart, and resumes at the part where it was killed.
FAKE = """
import os, sys, time
from pathlib import Path
from lyrics import errors, io
from lyrics.stage import leaving_token, one_sentence, run_stage

def first(work):
    done = work / "done"
    done.mkdir(exist_ok=True)
    pause = float(os.environ.get("PAUSE", "0"))
    for part in range(10):
        if not (done / str(part)).exists():
            Path("log").open("a").write(f"{part} {os.getpid()}\\n")
            time.sleep(pause)
            (done / str(part)).write_text("x" * int(os.environ.get("BYTES", "10")))
        elif part == int(os.environ.get("STOP_AT", "-1")):
            raise errors.InputError("stopped as told")
    io.write_text(work / "out" / "result", "".join(sorted(p.read_text() for p in done.iterdir())))

def second(work):
    failures = Path("fail")
    left = int(failures.read_text()) if failures.exists() else 0
    if left:
        failures.write_text(str(left - 1))
        raise errors.RetryableError("the server does not answer")
    if Path("bad").exists():
        raise errors.InputError("found a bad input; expected a good one")
    io.write_text(work / "out" / "result", Path("data/first/result").read_text() * 2)

with one_sentence():
    name = sys.argv[1]
    if name == "compose":
        from lyrics import compose
        with leaving_token("compose"):
            compose.write(compose.compose())
    else:
        run_stage(name, {"first": first, "second": second}[name])
"""


class Project:
    """The fake project in `root`; `run` and `start` give it this Python and this package."""

    def __init__(self, root: Path) -> None:
        self.root = root
        scripts = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(root / ".prefect"),
            "HOME": str(root / "home"),
        }
        (root / FOLDER).mkdir(parents=True)
        (root / FOLDER / "a").write_text("a")
        shutil.copytree(ROOT / "params", root / "params")
        self.choose()
        (root / "dvc.yaml").write_text(DVC_YAML)
        (root / "fake.py").write_text(FAKE)
        (root / ".gitignore").write_text(
            "/build/\n/data/\n/models/\n/reports/\n/.prefect/\n/home/\n/log\n/mlruns/\n/mlflow.db*\n"
        )
        self.run(["git", "init", "-q"])
        (root / ".dvc").mkdir()
        (root / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
        (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")

    def choose(self, text: str = f"preset: tiny\ndata: world\nfolder: {FOLDER}\noverrides: {{}}\n") -> None:
        (self.root / "params" / "run.yaml").write_text(text)

    def run(self, command: Sequence[str], check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            command, cwd=self.root, env={**self.environment, **variables}, capture_output=True, text=True, timeout=600
        )
        assert not check or ran.returncode == 0, ran.stdout + ran.stderr
        return ran

    def start(self, command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.root,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def verb(self, name: str) -> list[str]:
        return [sys.executable, "fake.py", name]

    def dvc(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "dvc", *arguments]

    def log(self) -> list[tuple[int, int]]:
        """(part, process id) for each part that `first` worked on."""
        path = self.root / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(int(part), int(pid)) for part, pid in map(str.split, lines)]

    def processes(self) -> list[psutil.Process]:
        """Every living process that works in this project."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and Path(process.cwd()).is_relative_to(self.root):
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def result(self, path: str) -> str:
        return (self.root / path).read_text()


def wait_for(condition: Callable[[], object], seconds: float = 300.0, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(pause)
