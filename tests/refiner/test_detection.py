import numpy as np
import pytest
import torch
from PIL import Image
from quarter_encoder import quarter_encoder

from lyrics.config import DetectorPart
from lyrics.data.records import Annotation
from lyrics.foundation import detector, manifest
from lyrics.refiner import detection

PART = DetectorPart(
    source="fitted",
    name="yolo_small",
    revision=None,
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


def test_the_oracle_reads_finer_maps_beside_the_last(monkeypatch, tmp_path):
    """A red object in a white quarter, whose mean hides its colour; the finer map tells it."""
    monkeypatch.setattr("lyrics.model.vision.load_image_encoder", lambda _: quarter_encoder(finer=True))
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[2:4, 2:4] = (255, 0, 0)
    finer = detection.AnnotationDetector(tmp_path)
    truth = (Annotation(category="dot", box_xyxy=(2.0, 2.0, 4.0, 4.0)),)
    (found,) = finer.detect([Image.fromarray(pixels)], [["dot"]], [truth])
    assert found.features.shape == (1, finer.width) == (1, 6)
    centred = np.array([2, -1, -1]) / np.sqrt(6)  # of length 1, as the last map's part is
    np.testing.assert_allclose(found.features[0, :3], centred, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.features[0, 3:]), 1.0, atol=1e-5)


def test_the_oracle_without_annotations_finds_nothing(oracle):
    assert [len(found) for found in oracle.detect([PICTURE], [["star"]])] == [0]


def test_a_detector_that_is_off_finds_nothing(tmp_path):
    (tmp_path / "detector").mkdir()
    manifest.write(tmp_path / "detector", "detector", manifest.Made(source="none", name="off", parameters=0))
    off = detection.load_detector(tmp_path, PART)
    found = off.detect([PICTURE] * 2, [["star"], []])
    assert [(len(one), one.features.shape) for one in found] == [(0, (0, 0))] * 2
    assert off.width == 0
