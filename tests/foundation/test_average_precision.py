import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from lyrics.data import coco
from lyrics.data.records import Annotation, ImageRecord
from lyrics.foundation.average_precision import NAMES, average_precision, results_of, truth_of

FORMATS = Path(__file__).parents[3] / "shared/formats"
BOX = (10.0, 10.0, 30.0, 30.0)


@pytest.fixture
def published():
    """Ground truth, results and the figures that COCO published for them."""
    if not FORMATS.is_dir():
        pytest.skip(f"{FORMATS} is absent: the official files are not part of the project")
    entry = json.loads((FORMATS / "expected_scores.json").read_text())["coco_bbox_100"]
    return FORMATS / entry["gt"], json.loads((FORMATS / entry["dets"]).read_text()), entry["scores"]


def test_the_published_figures_to_three_decimals(published):
    truth, results, scores = published
    found = average_precision(json.loads(truth.read_text()), results)
    assert set(scores) == set(NAMES)
    assert {name: round(value, 3) for name, value in found.items()} == scores


def test_the_published_figures_from_our_own_records(published):
    """Read as every annotated split is: crowds, areas and clipped boxes survive."""
    path, results, scores = published
    instances = coco.read_instances(path)
    records = [
        ImageRecord(
            image_id=str(image_id),
            path="",
            width=image["width"],
            height=image["height"],
            annotations=tuple(one.annotation() for one in instances.objects if one.image_id == image_id),
        )
        for image_id, image in instances.images.items()
    ]
    number = {image_id: i for i, image_id in enumerate(instances.images, start=1)}
    truth = truth_of(records, {category["name"]: category["id"] for category in instances.categories})
    found = average_precision(truth, [{**one, "image_id": number[one["image_id"]]} for one in results])
    assert {name: round(value, 3) for name, value in found.items()} == scores


def record(*annotations):
    return ImageRecord(image_id="a", path="", width=64, height=64, annotations=annotations)


def test_exact_missed_and_absent_boxes():
    disc = Annotation(category="disc", box_xyxy=BOX)
    exact = results_of(1, [BOX], [0.9])
    assert average_precision(truth_of([record(disc)]), exact)["AP"] == pytest.approx(1.0)
    assert average_precision(truth_of([record(disc)] * 2), exact)["AP50"] == pytest.approx(0.5, abs=0.01)
    assert average_precision(truth_of([record(disc)]), [])["AP"] == 0.0
    assert average_precision(truth_of([record()]), exact)["AP"] is None
    assert average_precision(truth_of([record(disc)]), exact)["AP_large"] is None


def test_another_category_is_a_miss_and_a_crowd_is_no_mistake():
    ids = {"disc": 1, "square": 2}
    disc = Annotation(category="disc", box_xyxy=BOX)
    crowd = Annotation(category="disc", box_xyxy=(32.0, 32.0, 64.0, 64.0), crowd=True)
    truth = truth_of([record(disc, crowd)], ids)
    assert average_precision(truth, results_of(1, [BOX], [0.9], [2]))["AP"] == 0.0
    inside_the_crowd = (40.0, 40.0, 50.0, 50.0)
    found = average_precision(truth, results_of(1, [inside_the_crowd, BOX], [0.9, 0.8], [1, 1]))
    assert found["AP"] == pytest.approx(1.0)


def test_masks():
    pixels = np.zeros((64, 64), np.uint8)
    pixels[10:30, 10:30] = 1
    rle = coco_mask.encode(np.asfortranarray(pixels))
    rle["counts"] = rle["counts"].decode()
    truth = truth_of([record(Annotation(category="disc", box_xyxy=BOX, rle=rle))])
    result = {"image_id": 1, "category_id": 1, "score": 0.9, "segmentation": rle}
    assert average_precision(truth, [result], "segm")["AP"] == pytest.approx(1.0)
