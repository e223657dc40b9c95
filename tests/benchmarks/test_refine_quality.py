from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import refine_quality
from lyrics.data.records import Annotation, ImageRecord
from lyrics.foundation import masks
from lyrics.refiner.refiner import RefinedObjects


class Halfway:
    """Finds the first annotated object of each picture, and nothing else."""

    settings = SimpleNamespace(batch_size=2)

    def refine(self, images, annotations):
        return [self._first(image, truth[:1]) for image, truth in zip(images, annotations, strict=True)]

    def _first(self, image, truth):
        shapes = np.zeros((len(truth), image.height, image.width), bool)
        for shape, one in zip(shapes, truth, strict=True):
            x0, y0, x1, y1 = map(int, one.box_xyxy)
            shape[y0:y1, x0:x1] = True
        return RefinedObjects(
            tags=tuple(one.category for one in truth),
            boxes_xyxy=np.array([one.box_xyxy for one in truth], np.float32).reshape(-1, 4),
            scores=np.ones(len(truth), np.float32),
            masks=masks.encode(shapes),
            detector_tokens_ND=np.zeros((len(truth), 0)),
            segmenter_tokens_ND=np.zeros((len(truth), 0)),
            spatial_text="",
        )


def test_figures_of_pictures_of_which_half_is_found(tmp_path):
    records = []
    for number in range(5):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
        boxes = [(2.0, 3.0, 12.0, 13.0), (20.0, 5.0, 33.0, 28.0)]
        shapes = np.zeros((2, 30, 40), bool)
        shapes[0, 3:13, 2:12] = shapes[1, 5:28, 20:33] = True
        rles = [{"size": [30, 40], "counts": counts} for counts in masks.encode(shapes)]
        truth = tuple(Annotation(category="cup", box_xyxy=b, rle=r) for b, r in zip(boxes, rles, strict=True))
        records.append(
            ImageRecord(
                image_id=str(number), path=str(tmp_path / f"{number}.png"), width=40, height=30, annotations=truth
            )
        )
    found = refine_quality.figures(Halfway(), records)
    assert (found["box_recall"], found["box_precision"], found["mask_iou"]) == (0.5, 1.0, 1.0)
    assert found["box_ap"] == found["mask_ap"] == pytest.approx(0.5, abs=0.01)
    row = refine_quality.table([("val", "halfway", 5, found)]).splitlines()[-1]
    assert row.startswith("| val | halfway | 5 | 0.50") and row.endswith("| 1.000 |")
