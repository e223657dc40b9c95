import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import ExifTags, Image
from small_scenes import SIDE, TAGS, HashClip, write_scenes

from lyrics.config import DetectorPart
from lyrics.data.records import ImageRecord
from lyrics.errors import InputError
from lyrics.foundation import detector, manifest, quality, regions, yolo
from lyrics.io import sha256_tree
from lyrics.stage import NullTracker

PART = DetectorPart(
    source="fitted",
    name="yolo_small",
    revision=None,
    sha256=None,
    image_size_px=SIDE,
    score_threshold=0.0,
    nms_iou=0.6,
    epochs=1,
    batch_size=6,
    lr=1e-3,
)


def fit(work, part=PART):
    (work / "out").mkdir(parents=True)
    config = SimpleNamespace(foundation=SimpleNamespace(detector=part), seed=0, device="cpu")
    made = detector.fit(config, work, NullTracker())
    manifest.write(work / "out", "detector", made)
    return made


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two fits of the same scenes."""
    folder = tmp_path_factory.mktemp("project")
    write_scenes(folder, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("lyrics.foundation.clip.load_clip", lambda *_: HashClip())
        fit(folder / "first")
        fit(folder / "second")
    return folder


def test_two_fits_are_the_same_bytes(project):
    assert sha256_tree(project / "first/out") == sha256_tree(project / "second/out")
    assert sorted(file.name for file in (project / "first").rglob("*")) == [
        "detector.json",
        "manifest.json",
        "out",
        "regions.safetensors",
        "yolo.safetensors",
    ]


def test_the_manifest_reports_quality(project):
    found = manifest.verify(project / "first/out")
    assert set(found["quality"]) == {"map50", "map", "recall", "tag_accuracy", "tag_accuracy_among_true"}
    assert found["parameters"] > 600_000


def test_it_loads_without_unpickling(project, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr("lyrics.foundation.clip.load_clip", lambda *_: HashClip())
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.load", refuse)
    loaded = detector.load(project / "first/out", project / "clip")
    images = [Image.new("RGB", (100, 50), "red"), Image.new("RGB", (SIDE, SIDE), "blue")]
    proposals = loaded.propose(images, score_threshold=0.0, nms_iou=0.6)
    assert loaded.vocabulary == TAGS
    for image, proposal in zip(images, proposals, strict=True):
        assert len(proposal.objectness) > 0
        assert proposal.features.shape == (len(proposal.objectness), loaded.width)
        assert (proposal.boxes_xyxy[:, [0, 2]] <= image.width + 1e-3).all()
        assert (proposal.boxes_xyxy[:, [1, 3]] <= image.height + 1e-3).all()
        assert (proposal.objectness.diff() <= 0).all()
        shares = loaded.tag_probabilities(proposal, ["disc", "a tag that no fit saw"])
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(len(shares)))
    nothing = loaded.propose(images, score_threshold=1.0, nms_iou=0.6)
    assert [p.features.shape for p in nothing] == [(0, loaded.width)] * 2


def test_an_unknown_description_is_refused(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    with pytest.raises(InputError, match="'yolo_huge' is no YOLO description; choices: yolo_small"):
        fit(tmp_path, dataclasses.replace(PART, name="yolo_huge"))


def test_the_oracle_has_no_weights(tmp_path):
    made = fit(tmp_path, dataclasses.replace(PART, source="annotations"))
    assert made.parameters == 0
    assert made.quality == {}


def test_letterbox_keeps_proportions_and_pads_with_grey():
    pixels, scales = regions.letterbox([Image.new("RGB", (100, 50), "white"), Image.new("L", (64, 64), 0)], 64)
    assert scales == [0.64, 1.0]
    assert (pixels[0, :, :32] == 1).all()
    assert torch.allclose(pixels[0, :, 32:], torch.tensor(114 / 255))
    assert (pixels[1] == 0).all()


def test_pooling_reads_what_lies_in_the_box():
    """A map whose value is its column, at stride 4: the mean inside a box is the column of its middle."""
    columns = torch.arange(16.0).expand(1, 1, 16, 16)
    boxes = [torch.tensor([[8.0, 8.0, 24.0, 40.0], [16.0, 0.0, 48.0, 64.0]])]
    pooled = regions.pool([columns, columns * 10], boxes, 64, 1)
    assert pooled.flatten(1).tolist() == [[3.5, 35.0], [7.5, 75.0]]


def test_a_true_box_is_matched_once():
    true = [(0.0, 0.0, 10.0, 10.0), (20.0, 20.0, 30.0, 30.0)]
    found = [(20.0, 20.0, 30.0, 29.0), (21.0, 20.0, 30.0, 30.0), (0.0, 0.0, 10.0, 4.0)]
    assert quality.match(found, true) == [(0, 1)]
    assert quality.match([], true) == []


def test_copies_leave_the_raw_pictures_alone(tmp_path):
    write_scenes(tmp_path, 2)
    from lyrics.data.annotated import read_split

    records = read_split(tmp_path / "data/raw/foundation").images
    detector.write_layout(records, tmp_path / "images", tmp_path / "labels")
    copies = sorted((tmp_path / "images").iterdir())
    assert [path.is_symlink() or path.stat().st_nlink > 1 for path in copies] == [False, False]
    first = Path(tmp_path / "labels/0000000.txt").read_text().splitlines()
    x0, _, x1, _ = records[0].annotations[0].box_xyxy
    assert len(first) == 2
    assert float(first[0].split()[1]) == pytest.approx((x0 + x1) / 2 / SIDE, abs=1e-6)


def test_boxes_refer_to_the_stored_pixels_that_ultralytics_reads_too(tmp_path):
    """It turns a picture by its EXIF orientation, and passes over a GIF."""
    yolo.load_ultralytics()
    from ultralytics.utils.patches import imread

    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=turned)
    Image.new("RGB", (40, 20)).save(tmp_path / "b.gif")
    Image.new("RGB", (40, 20)).save(tmp_path / "c.jpg")
    paths = [tmp_path / name for name in ("a.jpg", "b.gif", "c.jpg")]
    records = [ImageRecord(image_id=path.name, path=str(path), width=40, height=20) for path in paths]
    detector.write_layout(records, tmp_path / "images", tmp_path / "labels")
    written = sorted((tmp_path / "images").iterdir())
    assert [path.name for path in written] == ["0000000.png", "0000001.png", "0000002.jpg"]
    assert [imread(str(path)).shape[:2] for path in written] == [(20, 40)] * 3
    assert written[2].read_bytes() == (tmp_path / "c.jpg").read_bytes()
