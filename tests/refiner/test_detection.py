from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from quarter_encoder import quarter_encoder

from lyrics.config import DetectorPart
from lyrics.data.records import Annotation
from lyrics.foundation import detector, detector_file, manifest, yolo
from lyrics.io import sha256_file
from lyrics.refiner import detection

PART = DetectorPart(
    source="fitted",
    name="yolo_small",
    sha256=None,
    image_size_px=64,
    score_threshold=0.3,
    nms_iou=0.6,
    epochs=1,
    batch_size=1,
    lr=0.1,
)
PICTURE = Image.new("RGB", (64, 64))


class Regions:
    """Three boxes: surely a star, surely a moon, and one that could be either."""

    width, vocabulary = 2, ("moon", "star", "sun")

    def propose(self, images, *, score_threshold, nms_iou):
        assert (score_threshold, nms_iou) == (PART.score_threshold, PART.nms_iou)
        boxes = torch.arange(12.0).reshape(3, 4)
        one = detector.Proposals(boxes, torch.tensor([0.8, 0.9, 0.7]), torch.eye(3)[:, :2], torch.zeros(3, 1))
        return [one for _ in images]

    def tag_probabilities(self, proposal, tags):
        of_tag = {"star": [0.9, 0.0, 0.5], "moon": [0.0, 1.0, 0.5]}
        return torch.tensor([of_tag.get(tag, [0.1, 0.0, 0.0]) for tag in tags]).T


def test_boxes_take_the_tag_that_they_resemble_best_first():
    (found,) = detection.RegionDetector(Regions(), PART).detect([PICTURE], [["star", "moon"]])
    assert found.tag_index.tolist() == [1, 0, 0]
    assert found.score == pytest.approx([0.9, 0.72, 0.35])
    assert found.boxes_xyxy[0].tolist() == [4, 5, 6, 7]
    assert found.features.tolist() == [[0, 1], [1, 0], [0, 0]]


def test_an_object_that_no_tag_fits_is_left_out():
    """The moon is surely a moon, which is not among the tags of the picture."""
    (found,) = detection.RegionDetector(Regions(), PART).detect([PICTURE], [["star"]])
    assert found.tag_index.tolist() == [0, 0]
    assert found.score == pytest.approx([0.72, 0.35])


def test_no_tag_no_box():
    none, some = detection.RegionDetector(Regions(), PART).detect([PICTURE] * 2, [[], ["star"]])
    assert (len(none), none.boxes_xyxy.shape, none.features.shape) == (0, (0, 4), (0, 2))
    assert len(some) == 2


@pytest.fixture
def oracle(monkeypatch, tmp_path):
    monkeypatch.setattr("lyrics.model.vision.load_image_encoder", quarter_encoder)
    (tmp_path / "detector").mkdir()
    manifest.write(tmp_path / "detector", "detector", manifest.Made(source="annotations", name="oracle", parameters=0))
    return detection.load_detector(tmp_path, PART)


def test_the_oracle_gives_the_annotated_boxes_of_the_tags(oracle):
    truth = (
        Annotation(category="star", box_xyxy=(1.0, 2.0, 30.0, 40.0)),
        Annotation(category="moon", box_xyxy=(10.0, 2.0, 60.0, 20.0)),
        Annotation(category="cat", box_xyxy=(0.0, 0.0, 5.0, 5.0)),
    )
    first, second = oracle.detect([PICTURE, PICTURE], [["moon", "star"], ["moon"]], [truth, ()])
    assert first.tag_index.tolist() == [1, 0]
    assert first.boxes_xyxy.tolist() == [[1, 2, 30, 40], [10, 2, 60, 20]]
    assert first.score.tolist() == [1, 1]
    assert first.features.shape == (2, oracle.width)
    assert len(second) == 0


def test_the_oracle_reads_features_where_the_box_is(oracle):
    """Left half black, right half white, and a picture that is not a square."""
    pixels = np.zeros((60, 120, 3), np.uint8)
    pixels[:, 60:] = 255
    boxes = [(0.0, 0.0, 60.0, 60.0), (60.0, 0.0, 120.0, 60.0)]
    truth = tuple(Annotation(category="half", box_xyxy=box) for box in boxes)
    (found,) = oracle.detect([Image.fromarray(pixels)], [["half"]], [truth])
    np.testing.assert_allclose(found.features[:, 0], [0.125, 0.875], atol=0.02)  # RoIAlign reads between the quarters


def test_the_oracle_without_annotations_finds_nothing(oracle):
    assert [len(found) for found in oracle.detect([PICTURE], [["star"]])] == [0]


@pytest.fixture
def named_file(tmp_path, monkeypatch):
    """Converts a model of random weights that ultralytics wrote as a .pt file."""

    def convert(model):
        torch.save({"model": model, "train_args": {}}, tmp_path / "their.pt")
        part = SimpleNamespace(
            name=str(tmp_path / "their.pt"), sha256=sha256_file(tmp_path / "their.pt"), image_size_px=64
        )
        out = tmp_path / "detector"
        out.mkdir()
        manifest.write(out, "detector", detector_file.fit(part, out))
        return tmp_path

    text = tmp_path / "hub"
    text.mkdir()
    monkeypatch.setattr(detector_file.hub, "fetch", lambda *_: SimpleNamespace(folder=text))
    return convert


def their_model(world):
    yolo.load_ultralytics()
    from ultralytics.nn.tasks import DetectionModel, WorldModel

    torch.manual_seed(0)
    model = WorldModel("yolov8n-worldv2.yaml", nc=3, verbose=False) if world else DetectionModel("yolo11n.yaml", nc=3)
    model.names = {0: "Star", 1: "moon", 2: "sun"}
    return model.eval()


@torch.inference_mode()
def test_a_named_yolo_scores_the_tags_it_has_a_class_for(named_file):
    model = their_model(world=False)
    folder = named_file(model)
    assert not list((folder / "detector").glob("*.pt"))
    loaded = detector_file.NamedDetector(folder / "detector")
    pixels = torch.rand(2, 3, 64, 64)
    expected = model(pixels)[0]
    predictions, maps = loaded.predict(pixels, ["moon", "unicorn", "star"])
    torch.testing.assert_close(predictions[:, :5], expected[:, [0, 1, 2, 3, 5]])
    assert (predictions[:, 5] == 0).all()
    torch.testing.assert_close(predictions[:, 6], expected[:, 4])
    assert maps[0].shape[:2] == (2, loaded.width)


class Texts:
    def __init__(self, *_):
        pass

    def encode(self, tags):
        return torch.stack([torch.eye(512)[len(tag)] for tag in tags])


@torch.inference_mode()
def test_a_named_yolo_world_scores_any_tag(named_file, monkeypatch):
    monkeypatch.setattr(detector_file, "_TextTower", Texts)
    model = their_model(world=True)
    folder = named_file(model)
    loaded = detector_file.NamedDetector(folder / "detector")
    pixels = torch.rand(1, 3, 64, 64)
    model.txt_feats, model.model[-1].nc = Texts().encode(["moon", "a unicorn"])[None], 2
    torch.testing.assert_close(loaded.predict(pixels, ["moon", "a unicorn"])[0], model(pixels)[0])


def test_a_named_detector_behind_the_interface(named_file, monkeypatch):
    folder = named_file(their_model(world=False))
    part = SimpleNamespace(score_threshold=0.0, nms_iou=0.6)
    found = detection.load_detector(folder, part).detect(
        [Image.new("RGB", (100, 50), "red"), PICTURE, PICTURE], [["sun", "moon"], ["star"], []]
    )
    assert set(found[0].tag_index.tolist()) <= {0, 1}
    assert len(found[0]) > 0
    assert (found[0].boxes_xyxy[:, 3] <= 50).all()
    assert found[0].features.shape[1] == found[1].features.shape[1]
    assert set(found[1].tag_index.tolist()) == {0}
    assert len(found[2]) == 0
