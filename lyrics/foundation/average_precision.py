"""COCO's average precision and recall of boxes or masks, by pycocotools: the official implementation."""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lyrics.data.records import ImageRecord

# In the order of COCOeval's twelve figures.
NAMES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


def average_precision(
    truth: dict[str, Any], results: Sequence[dict[str, Any]], kind: Literal["bbox", "segm"] = "bbox"
) -> dict[str, float | None]:
    """The figures of COCO's detection leaderboard.

    Args:
        truth: a document in COCO's format with images, annotations and categories.
        results: in COCO's results format: image_id, category_id, score, and bbox or segmentation.

    Returns:
        By name; None where no annotation is of that size.
    """
    if not truth["annotations"]:
        return dict.fromkeys(NAMES)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        annotated = COCO()
        annotated.dataset = truth
        annotated.createIndex()
        # loadRes adds fields to what it is given, and takes no empty list.
        found = annotated.loadRes([dict(result) for result in results]) if results else COCO()
        scorer = COCOeval(annotated, found, kind)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return {name: None if value < 0 else float(value) for name, value in zip(NAMES, scorer.stats, strict=True)}


def truth_of(records: Sequence[ImageRecord], category_ids: dict[str, int] | None = None) -> dict[str, Any]:
    """Records as a COCO document; image ids count from 1, in order.

    Args:
        category_ids: of each category; None makes all of one category, 1. What has another category is left out.
    """
    images = [{"id": i, "width": r.width, "height": r.height} for i, r in enumerate(records, start=1)]
    annotations: list[dict[str, Any]] = []
    for i, record in enumerate(records, start=1):
        for one in record.annotations:
            category = 1 if category_ids is None else category_ids.get(one.category)
            if category is None:
                continue
            x0, y0, x1, y1 = one.box_xyxy
            annotation: dict[str, Any] = {"id": len(annotations) + 1, "image_id": i, "category_id": category}
            annotation |= {"iscrowd": int(one.crowd), "bbox": [x0, y0, x1 - x0, y1 - y0]}
            if one.rle is not None:
                annotation["segmentation"] = one.rle
            annotation["area"] = one.area if one.area is not None else (x1 - x0) * (y1 - y0)
            annotations.append(annotation)
    categories = [{"id": number, "name": name} for name, number in (category_ids or {"object": 1}).items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def results_of(
    image: int,
    boxes_xyxy: Sequence[Sequence[float]] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
    category_ids: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Boxes of the picture with that number (from 1), in COCO's results format."""
    categories = [1] * len(scores) if category_ids is None else category_ids
    return [
        {
            "image_id": image,
            "category_id": category,
            "bbox": [float(x0), float(y0), float(x1) - float(x0), float(y1) - float(y0)],
            "score": float(score),
        }
        for (x0, y0, x1, y1), score, category in zip(boxes_xyxy, scores, categories, strict=True)
    ]
