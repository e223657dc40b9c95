"""A copy of what the pipeline needs, with a repository and a registry of its own; runs commands there."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("dvc.yaml", "requirements.lock", ".dvcignore", ".gitignore", ".dvc/config")


@dataclasses.dataclass(frozen=True)
class RealProject:
    root: Path

    def __call__(self, *command: str) -> str:
        """Run `python -m COMMAND` there; what it printed."""
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(self.root),
        }
        ran = subprocess.run(
            [sys.executable, "-m", *command], cwd=self.root, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{' '.join(command)}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout


def copy(folder: Path) -> RealProject:
    for name in ("lyrics", "params"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    return RealProject(folder)
