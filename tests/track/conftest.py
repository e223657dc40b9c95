"""A project folder with a fake model whose quality is chosen, beside a real MLflow registry in sqlite."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lyrics import io
from lyrics.track import packaging
from lyrics.track.registry import Sources

FAKE_INFERENCE = '''
import json
from pathlib import Path


class Lyrics:
    """Answers with its own quality and what it was given."""

    def __init__(self, quality):
        self.quality = quality

    @classmethod
    def from_folders(cls, stage2, foundation, device="cpu"):
        assert (Path(foundation) / "clip" / "manifest.json").exists()
        return cls(json.loads((Path(stage2) / "config.json").read_text())["quality"])

    def answer(self, image, question):
        return f"{self.quality} {image.mode} {image.width}x{image.height} {question}"
'''
LOCK = """\
mlflow==3.17.2 \\
    --hash=sha256:00
# a comment
numpy==2.4.6 ; python_version >= '3.11'
-e .
"""
SAMPLES = 200


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A migrated, empty database: making one takes seconds, copying it nothing."""
    from lyrics.track import server

    folder = tmp_path_factory.mktemp("store")
    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        server.connect()
    assert Path.cwd() == before
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store):
    """The working folder: an empty registry, data, a lock file, and a fake package `lyrics` to be served."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "LYRICS_PARENT_RUN_ID", *os.environ):
        if name.startswith(("MLFLOW_TRACKING", "LYRICS_PARENT")):
            monkeypatch.delenv(name, raising=False)
    shutil.copy(empty_store, "mlflow.db")
    Path("requirements.lock").write_text(LOCK)
    for split in ("web", "test"):
        io.write_text(Path("data/raw") / split / "captions.json", f"[{split!r}]")
    io.write_json(Path("data/raw/summary.json"), {"test": 2})
    fake = tmp_path / "fake" / "lyrics"
    shutil.copytree(packaging.PACKAGE, fake, ignore=shutil.ignore_patterns("__pycache__"))
    (fake / "inference.py").write_text(FAKE_INFERENCE)
    return tmp_path


@pytest.fixture
def sources(project):
    return Sources(code=project / "fake" / "lyrics")


@pytest.fixture
def make_model(project, write_reports):
    """Writes models/ and reports/ of a model that answers the first `quality` share of the samples rightly."""

    def make(quality: float, samples: int = SAMPLES) -> None:
        io.write_json(Path("models/stage2/config.json"), {"quality": quality})
        manifest = {"part": "clip", "name": "clip", "revision": None, "licence": "Apache-2.0", "parameters": 1000}
        io.write_json(Path("models/foundation/clip/manifest.json"), manifest)
        write_reports(Path("reports"), quality, samples)

    return make


@pytest.fixture
def write_reports():
    return _write_reports


def _write_reports(folder: Path, quality: float, samples: int = SAMPLES) -> Path:
    right = [float(i < quality * samples) for i in range(samples)]
    table = pa.table(
        {
            "sample_id": [f"s{i}" for i in range(samples)],
            "image_id": [f"i{i // 4}" for i in range(samples)],
            "task": ["vqa"] * samples,
            "score": right,
        }
    )
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "samples" / "test.parquet")
    scores = {
        "model": sum(right) / samples,
        "most_frequent": 0.2,
        "other_image": 0.25,
        "other_features": 0.3,
        "n": samples,
    }
    evaluation = {
        "tokenizer": "regex",
        "splits": {"test": {"vqa_accuracy": scores, "vqa_accuracy/colour": scores}},
        "absent": {"meteor": "Java is absent"},
        "data": {"test": {"path": "data/raw/test", "sha256": io.sha256_tree(Path("data/raw/test"))}},
    }
    io.write_json(folder / "evaluation.json", evaluation)
    return folder
