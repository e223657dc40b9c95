"""Our reading of dvc.yaml is DVC's own, and DVC runs again what it should and nothing else."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_project import Project

from flows.stages import environment
from lyrics import dag

ROOT = Path(__file__).parents[2]


def test_stages_are_those_that_dvc_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    monkeypatch.chdir(ROOT)
    ours = dag.read()
    with Repo(str(ROOT)) as repo:
        theirs = {stage.name: stage for stage in repo.index.stages if hasattr(stage, "name")}
        assert ours.keys() == theirs.keys()
        for name, stage in theirs.items():
            assert ours[name].command == stage.cmd
            assert set(ours[name].outs) == {out.def_path for out in stage.outs}
            assert set(ours[name].reads) == {dep.def_path for dep in stage.deps}
            known = {dep.def_path: set(dep.params) for dep in stage.deps if hasattr(dep, "params")}
            assert {file: set(keys) for file, keys in ours[name].params.items()} == known
        edges = {(a.name, b.name) for a, b in repo.index.graph.edges}
    assert {(name, above) for name, stage in ours.items() for above in dag.upstream(stage, ours)} == edges


def test_the_order_is_upstream_first() -> None:
    stages = dag.read(ROOT / "dvc.yaml")
    order = list(stages)
    assert all(order.index(above) < order.index(name) for name in order for above in dag.upstream(stages[name], stages))


def test_what_a_stage_needs() -> None:
    stages = dag.read(ROOT / "dvc.yaml")
    assert dag.with_upstream("foundation@tokenizer", stages) == ["compose", "ingest", "foundation@tokenizer"]
    assert set(dag.with_upstream("evaluate", stages)) == set(stages)


def test_stage_two_reaches_nothing_before_it() -> None:
    """No stage before `finetune` reads the code or the values of stage 2."""
    stages = dag.read(ROOT / "dvc.yaml")
    for name in set(dag.with_upstream("finetune", stages)) - {"finetune", "compose"}:
        assert not any(key.startswith("stage2") for keys in stages[name].params.values() for key in keys), name
        assert "lyrics/train" not in stages[name].deps and "lyrics/train/stage2.py" not in stages[name].deps, name


def test_a_folder_outside_the_project_is_hashed(project: Project, tmp_path: Path) -> None:
    outside = tmp_path / "pictures"
    outside.mkdir()
    (outside / "one").write_text("1")
    project.choose(f"preset: tiny\ndata: photos\nfolder: {outside}\noverrides: {{}}\n")
    project.run(project.dvc("repro", "first"))
    assert "first" not in project.run(project.dvc("status", "first")).stdout
    (outside / "one").write_text("another")
    assert str(outside) in project.run(project.dvc("status", "first")).stdout


def test_an_experiment_runs_again_only_what_reads_the_value(project: Project) -> None:
    project.run(project.dvc("repro"))
    project.run(["git", "add", "-A"])
    project.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start"])
    runs = len(project.log())
    tuned = [*project.dvc("exp", "run", "--temp"), "-S", "params/stage2/tiny.yaml:steps=3"]
    shown = project.run(tuned).stdout
    assert "Running stage 'compose'" in shown and "Running stage 'second'" in shown
    assert "Running stage 'first'" not in shown and len(project.log()) == runs
    # Not laptop: it has as many steps as tiny.
    shown = project.run([*project.dvc("exp", "run", "--temp"), "-S", "params/run.yaml:preset=paper"]).stdout
    assert "Running stage 'second'" in shown and "Running stage 'first'" not in shown
    # build/config.yaml is made anew by compose: what is set there is lost, so nothing runs.
    shown = project.run([*project.dvc("exp", "run", "--temp"), "-S", "build/config.yaml:stage2.steps=9"], check=False)
    assert "Running stage 'second'" not in shown.stdout


def test_the_real_dvc_yaml_composes_in_a_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "repro", "compose"], cwd=clone, check=True, env=environment())
    assert (clone / "build/config.yaml").exists()
