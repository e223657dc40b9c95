"""What a version came from: commit, pipeline state, data and environment."""

import dataclasses
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

from lyrics import io

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "peft", "mlflow", "ultralytics", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lineage:
    """Attributes: `git_dirty` lists changed tracked files; `data` maps a data set to the hash of its files."""

    git_commit: str
    git_dirty: tuple[str, ...]
    dvc_lock_sha256: str
    data: Mapping[str, str]
    environment: Mapping[str, str]

    def tags(self) -> dict[str, str]:
        """As tags of a run or a model version."""
        clean = "clean" if not self.git_dirty else f"dirty: {', '.join(self.git_dirty)[:400]}"
        tags = {"git_commit": self.git_commit, "git_state": clean, "dvc_lock_sha256": self.dvc_lock_sha256}
        tags |= {f"data/{name}": sha256 for name, sha256 in self.data.items()}
        return tags | {f"environment/{name}": value for name, value in self.environment.items()}


def collect(root: Path = Path(), data: Path = Path("data/raw")) -> Lineage:
    """Everything that identifies where a model comes from; what is unknown is said, not left out."""
    lock = root / "dvc.lock"
    return Lineage(
        git_commit=_git(root, "rev-parse", "HEAD") or "none (not a git repository)",
        git_dirty=tuple(line[3:] for line in _git(root, "status", "--porcelain", "--untracked-files=no").splitlines()),
        dvc_lock_sha256=io.sha256_file(lock) if lock.exists() else "none (no dvc.lock)",
        data=data_hashes(root / data),
        environment=environment(),
    )


def data_hashes(folder: Path) -> dict[str, str]:
    """The content hash of every data set (sub-folder) of `folder`."""
    if not folder.is_dir():
        return {}
    return {child.name: io.sha256_tree(child) for child in sorted(folder.iterdir()) if child.is_dir()}


def model_sha256(stage2: Path, foundation: Path) -> dict[str, str]:
    """What a model is made of: `stage2`, and of `foundation` the manifests, which hold the hashes of its files."""
    manifests = sorted(foundation.glob("*/manifest.json"))
    return {"stage2": io.sha256_tree(stage2), "foundation": io.sha256_tree(*manifests)}


def code_sha256() -> str:
    """Of all modules of the package."""
    return io.sha256_tree(*sorted(PACKAGE.rglob("*.py")))


def content_sha256(**parts: Path) -> str:
    """One hash over named files and folders: equal content under equal names, equal hash, wherever it lies."""
    digest = hashlib.sha256()
    for name, path in sorted(parts.items()):
        digest.update(f"{name}\0{io.sha256_tree(path)}\n".encode())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def _git(root: Path, *arguments: str) -> str:
    """Output of git, or nothing where there is no git or no repository."""
    try:
        ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.rstrip() if ran.returncode == 0 else ""
