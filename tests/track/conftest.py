"""A project folder with a fake model whose quality is chosen, beside a real MLflow registry in sqlite."""

import importlib
import os
import shutil
import types
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lyrics import io
from lyrics.track import lineage, packaging
from lyrics.track.registry import Sources

FAKE_INFERENCE = '''
import json
from pathlib import Path
from types import SimpleNamespace


class Lyrics:
    """Answers with its own quality and what it was given; in a batch, names the colours that its encoder tells apart.

    Its encoder, its refiner (which finds no object) and its language model are this one object.
    """

    def __init__(self, quality, colours):
        self.quality, self.colours = quality, colours
        self.encoder = self.refiner = self
        self.model = SimpleNamespace(device="cpu")

    @classmethod
    def from_folders(cls, stage2, foundation, device="cpu"):
        manifest = json.loads((Path(foundation) / "clip" / "manifest.json").read_text())
        return cls(json.loads((Path(stage2) / "config.json").read_text())["quality"], manifest["colours"])

    def answer(self, image, question):
        return f"{self.quality} {image.mode} {image.width}x{image.height} {question}"

    @property
    def settings(self):
        from lyrics.config import Refine

        return Refine(
            coordinate_format="decimal3", max_objects=2, images_per_shard=5, batch_size=2,
            features="cached", feature_dtype="fp16",
        )

    def preprocess(self, images):
        import torch

        return torch.tensor([image.getpixel((0, 0)) for image in images], dtype=torch.float32)

    def look(self, images, device, batch_size=None):
        return self(self.preprocess(images))

    def __call__(self, pixels_B3):
        """One token a picture: 1 for a channel that is bright."""
        with Path("looked.txt").open("a") as log:
            log.write(f"{len(pixels_B3)}\\n")
        return (pixels_B3 > 200).float()[:, None]

    def refine(self, images, annotations):
        import numpy as np
        from lyrics.refiner.refiner import RefinedObjects

        none = np.zeros((0, 4), np.float32)
        found = RefinedObjects(
            tags=(), boxes_xyxy=none, scores=none[:, 0], masks=(),
            detector_tokens_ND=none, segmenter_tokens_ND=none, spatial_text="",
        )
        return [found] * len(images)

    def answer_batch(self, questions, seen, spatial_texts=None, max_new_tokens=32):
        said = [["red", "green", "blue"][int(image.image_tokens_PD[0].argmax())] for image in seen]
        seen_as = [colour if colour in self.colours else "?" for colour in said]
        boxed = [question.startswith("Where") for question in questions]
        return ["[0.000, 0.000, 0.500, 1.000]" if box else colour for box, colour in zip(boxed, seen_as)]
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

    def make(quality: float, samples: int = SAMPLES, colours: Sequence[str] = ()) -> None:
        io.write_json(Path("models/stage2/config.json"), {"quality": quality})
        manifest = {"part": "clip", "name": "clip", "revision": None, "licence": "Apache-2.0", "parameters": 1000}
        io.write_json(Path("models/foundation/clip/manifest.json"), {**manifest, "colours": list(colours)})
        write_reports(Path("reports"), quality, samples)

    return make


@pytest.fixture
def fake_model(monkeypatch):
    """The fake of `FAKE_INFERENCE` in this process."""
    module = types.ModuleType("fake")
    exec(FAKE_INFERENCE, module.__dict__)
    monkeypatch.setattr("lyrics.inference.Lyrics", module.Lyrics)
    return module.Lyrics


@pytest.fixture(scope="session")
def promote_flow():
    """The module, with a Prefect database of its own: making one takes ten seconds."""
    promote = importlib.import_module("flows.promote")  # before prefect: flows settles its environment
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=300):
        yield promote


@pytest.fixture
def flow(promote_flow):
    """`python -m flows.promote` in this process; returns the exit code."""
    from lyrics.stage import one_sentence

    def run(*arguments: str) -> int:
        try:
            with one_sentence():
                promote_flow.main(list(arguments))
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return run


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
    model = lineage.model_sha256(Path("models/stage2"), Path("models/foundation"))
    evaluation["data"] |= {name: {"sha256": sha256} for name, sha256 in model.items()}
    io.write_json(folder / "evaluation.json", evaluation)
    return folder
