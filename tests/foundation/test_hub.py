import importlib
import re
from pathlib import Path

import pytest
import yaml

from lyrics import compose
from lyrics import config as schema
from lyrics.errors import InputError
from lyrics.foundation import hub
from lyrics.stage import NullTracker

ROOT = Path(__file__).parents[2]
COMMIT = "a" * 40


@pytest.mark.parametrize("revision", [None, "main", "v1.0"])
def test_only_a_commit_counts_as_a_revision(revision):
    with pytest.raises(InputError, match="pin a commit"):
        hub.fetch("some/model", revision)


def test_a_missing_model_is_one_sentence_with_the_command(monkeypatch):
    def offline(*_, **__):
        raise OSError("cannot reach it\nwith many lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=f"hf download some/model --revision {COMMIT}") as caught:
        hub.fetch("some/model", COMMIT)
    assert "cannot reach it" in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_weights_are_never_asked_for_and_refused(monkeypatch, tmp_path):
    asked = {}

    def snapshot(name, *, revision, allow_patterns):
        asked.update(revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        hub.fetch("some/model", COMMIT)
    assert asked["revision"] == COMMIT and not any(p.endswith((".bin", ".pt", ".pth")) for p in asked["patterns"])
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert hub.fetch("some/model", COMMIT).file("model.safetensors").exists()


def test_every_part_that_paper_takes_from_the_hub_is_pinned():
    parts = yaml.safe_load((ROOT / "params/foundation/paper.yaml").read_text())
    taken = {name: part for name, part in parts.items() if part["source"] == "hub"}
    assert set(taken) == {"tokenizer", "llm", "clip", "segmenter"}
    assert all(re.fullmatch("[0-9a-f]{40}", part["revision"]) for part in taken.values())
    assert all(part["name"] in hub._LICENCES for part in taken.values())


@pytest.mark.parametrize("part", ["llm", "clip", "segmenter", "tokenizer"])
def test_without_its_weights_a_part_of_paper_stops_with_that_sentence(part, monkeypatch, tmp_path):
    def offline(*_, **__):
        raise OSError("cannot reach it")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    config = schema.parse(compose.preview(["~overrides", "preset=paper"], ROOT / "params/run.yaml"))
    (tmp_path / "out").mkdir()
    name = getattr(config.foundation, part).name
    with pytest.raises(InputError, match=f"where there is a network run: hf download {name} --revision [0-9a-f]{{40}}"):
        importlib.import_module(f"lyrics.foundation.{part}").fit(config, tmp_path, NullTracker())
