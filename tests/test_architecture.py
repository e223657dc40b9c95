"""What may import what, and whether dvc.yaml lists the code that each stage imports."""

import dataclasses
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from closure import ROOTS, WORLD, by_entry, closure, covered_by_folder, imports, is_code, listed

from lyrics import compose, config, dag
from lyrics.cli import PARTS

ROOT = Path(__file__).parents[1]
# flows -> lyrics.cli -> stages -> model; leaves are open to all. What a package imports beside itself and leaves:
LEAVES = {"bootstrap", "config", "compose", "dag", "errors", "io", "process", "seeding", "stage", "track"}
ALLOWED = {
    "model": set(),
    "world": {"data"},
    "data": {"world", "foundation", "model"},
    "foundation": {"data", "model"},
    "refiner": {"foundation", "data", "model"},
    "train": {"data", "refiner", "foundation", "model"},
    "evaluate": {"data", "refiner", "foundation", "model", "train", "inference", "drawing"},
    "plan": {"refiner", "foundation", "model", "train"},
    "track": set(),
}
# Boxes and tags as text: prompts and the refiner share the format, and it imports nothing itself.
SHARED = {"lyrics.refiner.spatial_text"}


def our_imports(file: Path) -> set[str]:
    """Second part of each of our own dotted names: `data` for lyrics.data.coco."""
    names = {name for name in imports(file) if name.startswith("lyrics.")}
    shared = {name for name in names if any(name == one or name.startswith(f"{one}.") for one in SHARED)}
    packages = {one.rpartition(".")[0] for one in shared if one in SHARED}
    return {name.split(".")[1] for name in names - shared - packages}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_in_one_direction(package: str) -> None:
    for file in (ROOT / "lyrics" / package).rglob("*.py"):
        wrong = {
            name
            for name in our_imports(file)
            if name not in LEAVES | ALLOWED[package] | {package} and (ROOT / "lyrics" / name).exists()
        }
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_our_own_code_imports_the_model_by_file() -> None:
    """What the package offers by name is for users: the closure of a stage would not see the file behind it."""
    for file in (ROOT / "lyrics").rglob("*.py"):
        names = {name.split(".")[2] for name in imports(file) if name.startswith("lyrics.model.")}
        assert all((ROOT / "lyrics/model" / f"{name}.py").exists() for name in names), file


def test_nobody_imports_the_flows_or_the_command_line() -> None:
    for file in (ROOT / "lyrics").rglob("*.py"):
        names = set(imports(file))
        assert not any(name.split(".")[0] == "flows" for name in names), file
        assert file.name == "__main__.py" or not any(name.startswith("lyrics.cli") for name in names), file


def test_only_track_and_the_served_model_import_mlflow() -> None:
    for file in [*(ROOT / "lyrics").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        place = file.relative_to(ROOT).as_posix()
        if not place.startswith("lyrics/track/") and place != "lyrics/serving.py":
            assert not any(name.split(".")[0] == "mlflow" for name in imports(file)), place


def test_no_machine_learning_in_the_flows() -> None:
    for file in (ROOT / "flows").rglob("*.py"):
        assert not {name.split(".")[0] for name in imports(file)} & {"torch", "transformers", "numpy"}, file


@pytest.mark.parametrize("entry", sorted({stage.partition("@")[0] for stage in ROOTS}))
def test_dvc_lists_the_code_that_a_stage_imports(entry: str) -> None:
    document = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    deps = listed(document["stages"][entry])
    wanted = covered_by_folder(deps, by_entry(ROOT)[entry])
    assert {dep for dep in deps if is_code(dep)} == set(wanted), "mend it with: python -m tests.closure --write"
    assert "requirements.lock" in deps


@pytest.mark.parametrize("stage", sorted(ROOTS))
def test_dvc_lists_the_keys_that_a_stage_reads(stage: str) -> None:
    """`config.KEY` in the files of the stage, without those that are another stage.

    The values of a foundation part are known through the part itself, where the stage reads that.
    """
    others = frozenset(start for starts in ROOTS.values() for start in starts) - set(ROOTS[stage])
    sections = {field.name for field in dataclasses.fields(config.Config)}
    read = {
        f"foundation.{part}" if section == "foundation" and part in PARTS else section
        for file in closure(ROOTS[stage], ROOT, others)
        if file.endswith(".py")
        for section, part in re.findall(r"\bconfig\.(\w+)(?:\.(\w+))?", (ROOT / file).read_text())
        if section in sections
    }
    if "engine" in read:  # who does the work must not start it again; only threads may change the last bits
        read = read - {"engine"} | {"engine.threads_per_worker"}
    described = dag.read(ROOT / "dvc.yaml")[stage]
    known = [
        *described.params["build/config.yaml"],
        *(d.removeprefix("models/").replace("/", ".") for d in described.deps),
    ]
    assert not {key for key in read if not any(key == one or key.startswith(f"{one}.") for one in known)}
    if "@" not in stage:  # the parts of foundation share one list; what a stage does not read would run it for nothing
        listed_keys = described.params["build/config.yaml"]
        assert not [key for key in listed_keys if not any(one == key or one.startswith(f"{key}.") for one in read)]


def test_the_stages_are_where_the_closure_begins() -> None:
    assert not [start for starts in ROOTS.values() for start in starts if not (ROOT / start).exists()]


def test_the_closure_follows_imports_inside_functions(tmp_path: Path) -> None:
    package = tmp_path / "lyrics" / "a"
    package.mkdir(parents=True)
    (package / "one.py").write_text("def f():\n    from lyrics.a import two\n")
    (package / "two.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lyrics.a.three\n")
    (package / "three.py").write_text("x = 1\n")
    assert closure(["lyrics/a/one.py"], tmp_path) == {"lyrics/a/one.py", "lyrics/a/two.py"}


def test_every_package_that_is_imported_is_declared() -> None:
    """Else it is there only because another package happens to need it."""

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [*project["dependencies"], *(one for some in project["optional-dependencies"].values() for one in some)]
    declared = {normal(re.match(r"[\w.-]+", one)[0]) for one in ranges}  # type: ignore[index]
    files = [file for package in ("lyrics", "flows") for file in (ROOT / package).rglob("*.py")]
    found = {name.partition(".")[0] for file in files for name in imports(file)}
    distributions = importlib.metadata.packages_distributions()
    others = found - set(sys.stdlib_module_names) - {"lyrics", "flows"}
    assert not {one for one in others if not {normal(d) for d in distributions.get(one, [one])} & declared}


def test_evaluate_runs_again_for_the_hashes_it_writes_and_for_no_other_file_of_the_registry() -> None:
    assert [file for file in by_entry(ROOT)["evaluate"] if "track" in file] == ["lyrics/track/lineage.py"]


def test_ingest_lists_the_embedded_world_through_the_folder() -> None:
    assert compose.EMBEDDED == WORLD
