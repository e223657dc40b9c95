"""Which files of `lyrics/` the code of a stage imports, read from the source: its code dependencies in dvc.yaml.

`python -m tests.closure` prints them; `--write` puts them into dvc.yaml.
"""

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

PACKAGE, WORLD, LOCK = "lyrics", "lyrics/world", "requirements.lock"
ROOTS = {
    "ingest": ["lyrics/data/ingest.py"],
    **{
        f"foundation@{part}": ["lyrics/foundation/fit.py", f"lyrics/foundation/{part}.py"]
        for part in ("tokenizer", "llm", "clip", "tagger", "detector", "segmenter")
    },
    "clean": ["lyrics/data/clean.py"],
    "refine": ["lyrics/refiner/refine.py"],
    "pretrain": ["lyrics/train/stage1.py"],
    "finetune": ["lyrics/train/stage2.py"],
    "evaluate": ["lyrics/evaluate/evaluate.py"],
}
# What runs a stage, describes or reports it has no part in the bytes of its result: the values of the configuration
# count, as params. The `__init__` of the root and of the model only offer names for use from outside.
NEUTRAL = (
    "lyrics/__init__.py",
    "lyrics/model/__init__.py",
    "lyrics/config.py",
    "lyrics/engine.py",
    "lyrics/engine_processes.py",
    "lyrics/engine_ray.py",
    "lyrics/engine_worker.py",
    "lyrics/errors.py",
    "lyrics/stage.py",
    "lyrics/track",
)
NOT_NEUTRAL = ("lyrics/track/lineage.py",)  # `evaluate` writes its hashes, which registration compares


@functools.cache
def imports(file: Path) -> tuple[str, ...]:
    """Dotted names that a file imports anywhere but under TYPE_CHECKING."""
    return tuple(_imports(file))


def _imports(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    unseen = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if node in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(module: str, root: Path) -> Iterator[Path]:
    """The file of a module and the `__init__` files that its import runs."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        base = root.joinpath(*parts[:end])
        for file in (base / "__init__.py", base.with_suffix(".py")):
            if file.exists():
                yield file


def is_neutral(path: str) -> bool:
    return path not in NOT_NEUTRAL and any(path == neutral or path.startswith(f"{neutral}/") for neutral in NEUTRAL)


def closure(starts: list[str], root: Path = Path(), stop: frozenset[str] = frozenset()) -> set[str]:
    """All files that the import of `starts` can read, without the neutral ones and empty files; with assets.

    Nothing is followed into or beyond the files of `stop`.
    """
    found: set[str] = set()
    waiting = [root / start for start in starts if (root / start).exists()]
    while waiting:
        file = waiting.pop()
        name = file.relative_to(root).as_posix()
        if name in found or name in stop or is_neutral(name):
            continue
        found.add(name)
        for module in imports(file):
            if module.split(".")[0] == PACKAGE:
                waiting += files_of(module, root)
        found |= {asset.relative_to(root).as_posix() for asset in _assets(file)}
    return {name for name in found if (root / name).is_dir() or (root / name).stat().st_size}


def _assets(file: Path) -> Iterator[Path]:
    """Files and folders beside a module, other than code, that it names in a string."""
    source = file.read_text()
    for other in file.parent.iterdir():
        is_code = other.suffix == ".py" or other.name == "__pycache__" or (other / "__init__.py").exists()
        if not is_code and f'"{other.name}"' in source.replace("/", '"'):
            yield other


def dependencies(starts: list[str], root: Path = Path()) -> list[str]:
    """The closure, with a whole package in place of its files where all of them are in it."""
    files = closure(starts, root)
    for package in sorted({Path(name).parent for name in files} - {Path(PACKAGE), *map(Path, NEUTRAL)}, key=str):
        inside = {p.relative_to(root).as_posix() for p in (root / package).rglob("*.py") if p.stat().st_size}
        if {name for name in inside if not is_neutral(name)} <= files:
            files = {name for name in files if package not in Path(name).parents} | {package.as_posix()}
    return sorted(files)


def by_entry(root: Path = Path()) -> dict[str, list[str]]:
    """Code dependencies per entry of dvc.yaml; the parts of a `foreach` group share one list."""
    starts: dict[str, list[str]] = {}
    for stage, files in ROOTS.items():
        starts.setdefault(stage.partition("@")[0], []).extend(files)
    return {entry: dependencies(files, root) for entry, files in starts.items()}


def listed(entry: dict) -> list[str]:
    return (entry.get("do") or entry)["deps"]


def is_code(dep: str) -> bool:
    return dep.startswith(f"{PACKAGE}/")


def main(arguments: list[str]) -> None:
    editor = YAML()
    editor.width = 120
    editor.indent(mapping=2, sequence=4, offset=2)
    path = Path("dvc.yaml")
    document = editor.load(path.read_text())
    for name, code in by_entry().items():
        deps = listed(document["stages"][name])
        wanted = [dep for dep in deps if not is_code(dep) and dep != LOCK] + covered_by_folder(deps, code) + [LOCK]
        print(name, *wanted, sep="\n  ")
        deps[:] = wanted
    if "--write" in arguments:
        with path.open("w") as opened:
            editor.dump(document, opened)


def covered_by_folder(deps: list[str], code: list[str]) -> list[str]:
    """Without the embedded world where it is the folder that `ingest` reads: that lists it already."""
    return [file for file in code if "${folder}" not in deps or not file.startswith(WORLD)]


if __name__ == "__main__":
    main(sys.argv[1:])
