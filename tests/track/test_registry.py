"""Registration, on a real registry."""

import functools
import re
import shutil
from pathlib import Path

import pytest

from lyrics import io
from lyrics.config import Promote
from lyrics.errors import InputError
from lyrics.track import packaging, registry, server, versions

SETTINGS = Promote(split="test", minimum={"vqa_accuracy": 0.5}, bootstrap_samples=100, confidence=0.95)


def test_registers_with_lineage_and_reuses_by_content(sources, make_model):
    make_model(0.7)
    first = registry.register({"preset": "tiny", "stage2": {"steps": 3}}, sources)
    assert (first.version, first.alias, first.reused, first.uri) == (1, "candidate", False, "models:/lyrics/1")
    assert registry.register({}, sources).reused, "the same content must not make a second version"
    client = server.connect()
    version = client.get_model_version_by_alias("lyrics", "candidate")
    tags = version.tags
    assert tags["content_sha256"] == sources.content_sha256()
    assert tags["data/test"] == io.sha256_tree(Path("data/raw/test"))
    assert {"git_commit", "git_state", "dvc_lock_sha256", "data/web"} <= tags.keys()
    assert tags["param/stage2.steps"] == "3" and tags["param/preset"] == "tiny"
    assert tags["eval/test/vqa_accuracy"] == "0.7000"
    assert "| test | vqa_accuracy | 0.700 | 0.200 | 0.250 | 0.300 | 200 |" in version.description
    assert "AGPL" in version.description and "meteor (Java is absent)" in version.description
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/test/vqa_accuracy.most_frequent"] == 0.2
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"raw/test", "raw/web"}


def test_another_evaluation_is_another_version(sources, make_model):
    make_model(0.5)
    registry.register({}, sources)
    make_model(0.6)
    second = registry.register({}, sources)
    assert (second.version, second.reused) == (2, False)
    make_model(0.5)
    third = registry.register({}, sources)
    assert (third.version, third.reused) == (1, True)
    assert versions.by_alias(server.connect(), "candidate").version in (1, "1")


def test_version_whose_files_are_gone_is_not_reused(sources, make_model):
    make_model(0.5)
    registry.register({}, sources)
    shutil.rmtree("mlruns")
    with pytest.raises(InputError, match=r"gone from .*register it again"):
        registry.resolve("models:/lyrics@candidate")
    assert registry.register({}, sources).version == 2
    assert registry.resolve("models:/lyrics@candidate").stage2.is_dir()


def test_the_package_is_self_contained(sources, make_model):
    make_model(0.5)
    io.write_text(sources.code / ".cache" / "paths", "/home/me")
    registry.register({}, sources)
    local = registry.resolve("models:/lyrics@candidate")
    folder = local.stage2.parents[1]
    assert local.label == "lyrics version 1 (candidate)"
    assert Path.cwd() in local.stage2.parents, "local artifacts are used where they lie"
    pins = (folder / "requirements.txt").read_text().split("\n")
    assert pins == ["mlflow==3.17.2", 'numpy==2.4.6; python_version >= "3.11"'], "no hashes, nothing unpinned"
    assert (folder / "code" / "lyrics" / "inference.py").exists()
    assert not list((folder / "code").rglob(".*")) and not Path("build/package").exists()
    assert (folder / "model_card.md").read_text().startswith("# Lyrics")
    assert not list(folder.rglob("*.pkl")), "models from code are not pickled"
    assert re.search(r"image.*\n?.*prompt", (folder / "MLmodel").read_text())
    assert registry.resolve(folder).foundation == local.foundation


@pytest.mark.parametrize("missing", ["models/stage2", "models/foundation", "reports/evaluation.json"])
def test_unfinished_model_is_refused_before_anything_is_made(sources, make_model, missing):
    make_model(0.5)
    path = Path(missing)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=rf"{missing} does not exist.*dvc repro"):
        registry.register({}, sources)
    assert not server.connect().search_registered_models()


def test_missing_lock_file_is_named(sources, make_model):
    make_model(0.5)
    Path("requirements.lock").unlink()
    with pytest.raises(InputError, match=r"requirements\.lock does not exist"):
        registry.register({}, sources)
    assert not server.connect().search_model_versions("name = 'lyrics'")


def test_best_available_prefers_champion_then_candidate_then_files(sources, make_model):
    make_model(0.5)
    Path("mlflow.db").rename("elsewhere.db")
    assert registry.best_available().label == "local model models/stage2 (no model is registered)"
    assert not Path("mlflow.db").exists(), "looking must not make a registry"
    Path("elsewhere.db").rename("mlflow.db")
    registry.register({}, sources)
    assert registry.best_available().label == "lyrics version 1 (candidate)"
    server.connect().set_registered_model_alias("lyrics", "champion", "1")
    assert registry.best_available().label == "lyrics version 1 (champion)"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("models:/lyrics", "expected models:/lyrics@ALIAS"),
        ("models:/other/1", "names no version of lyrics"),
        ("models:/lyrics@champion", "No version of lyrics has the alias champion"),
        ("models:/lyrics/7", "no version 7; registered versions: none"),
        ("nowhere", "nowhere holds no model"),
    ],
)
def test_unknown_model_is_refused(project, uri, says):
    with pytest.raises(InputError, match=says):
        registry.resolve(uri)


def test_pins_need_exact_versions(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch>=2\n")
    with pytest.raises(InputError, match="no pinned requirement"):
        packaging.pinned(lock)


@pytest.mark.parametrize("part", ["stage2", "foundation"])
def test_scores_of_another_model_are_not_taken_for_this_ones(sources, make_model, part):
    make_model(0.9)
    other = {"stage2": Path("models/stage2/config.json"), "foundation": Path("models/foundation/clip/manifest.json")}
    io.write_json(other[part], {"trained": "again"})
    with pytest.raises(InputError, match=rf"reports holds scores of another model: its {part} is not .*dvc repro"):
        registry.register({}, sources)


def test_a_champion_whose_files_are_gone_is_passed_over_and_replaced(sources, make_model):
    make_model(0.9)
    registry.register({}, sources)
    promote = functools.partial(registry.promote, settings=SETTINGS, evaluate_again=lambda *_: pytest.fail("again"))
    promote(1)
    shutil.rmtree("mlruns")
    assert "the files of lyrics version 1 (candidate) are gone" in registry.best_available().label
    make_model(0.8)
    registry.register({}, sources)
    assert registry.best_available().label == "lyrics version 2 (candidate)"
    verdict = promote()
    assert verdict.former_lost and "(the files of version 1 are gone: nothing to compare with)" in str(verdict)
    assert registry.best_available().label == "lyrics version 2 (champion)"
