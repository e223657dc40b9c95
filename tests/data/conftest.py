import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_files import jpeg

from lyrics.config import Data
from lyrics.data import ingest
from lyrics.stage import NullTracker

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture
def shared():
    """Path below the real files beside the project; skips where they are absent."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{path} is absent: real files for testing are not part of the project")
        return path

    return find


@pytest.fixture
def make_split():
    """Write a COCO split with pictures 40 × 30 named a.jpg, b.jpg …; returns the two documents to change and save."""

    def make(folder: Path, names: str = "abc", first_seed: int = 0) -> SimpleNamespace:
        (folder / "images").mkdir(parents=True)
        images = []
        for number, name in enumerate(names, start=1):
            (folder / "images" / f"{name}.jpg").write_bytes(jpeg(first_seed + number))
            images.append({"id": number, "file_name": f"{name}.jpg", "width": 40, "height": 30})
        captions = [{"id": i["id"], "image_id": i["id"], "caption": f"picture {i['file_name']}"} for i in images]
        objects = [
            {"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [5, 5, 10, 10], "iscrowd": 0, "area": 100}
            for i in images
        ]
        categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "umbrella"}]
        documents = SimpleNamespace(
            captions={"images": images, "annotations": captions},
            instances={"images": images, "annotations": objects, "categories": categories},
        )

        def save() -> None:
            (folder / "captions.json").write_text(json.dumps(documents.captions))
            (folder / "instances.json").write_text(json.dumps(documents.instances))

        documents.save = save
        save()
        return documents

    return make


@pytest.fixture
def ingest_folder(tmp_path):
    """Ingest a COCO folder into a fresh work folder; returns data/raw."""

    def run(folder: Path, splits: dict[str, str], max_images: int | None = None) -> Path:
        work = tmp_path / f"work{len(list(tmp_path.glob('work*')))}"
        work.mkdir()
        data = Data(
            source="coco", folder=str(folder), splits=splits, sets=(), max_images=max_images, leak_hamming_bits=24
        )
        ingest.run(SimpleNamespace(seed=0, data=data), work, NullTracker())
        return work / "out"

    return run
