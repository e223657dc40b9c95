import pytest

from lyrics.errors import InputError
from lyrics.foundation import hub

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
