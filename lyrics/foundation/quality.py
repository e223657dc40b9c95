"""What the fitted detector and segmenter do on scenes that no part was fitted on."""

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision import ops

from lyrics.config import DetectorPart
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image

if TYPE_CHECKING:
    from lyrics.foundation.detector import Proposals, RegionDetector
    from lyrics.foundation.segmenter import BoxSegmenter

_BATCH = 64
_EVERY_BOX = 0.001
_SAME_OBJECT = 0.5


def of_detector(detector: "RegionDetector", records: Sequence[ImageRecord], part: DetectorPart) -> dict[str, float]:
    """Official COCO average precision of the boxes, and how often a found object gets its tag.

    `tag_accuracy` chooses among all tags the detector was fitted on, `tag_accuracy_among_true` among those that are in
    the picture.
    """
    proposals: list[Proposals] = []
    for some in _batches(records):
        images = [open_image(record.path) for record in some]
        proposals += detector.propose(images, score_threshold=_EVERY_BOX, nms_iou=part.nms_iou)
    found = [(proposal.boxes_xyxy.cpu().numpy(), proposal.objectness.cpu().numpy()) for proposal in proposals]
    average_precision, at_50 = box_average_precision(records, found)
    right, right_among_true, matched, objects = 0, 0, 0, 0
    for record, proposal in zip(records, proposals, strict=True):
        kept = torch.nonzero(proposal.objectness > part.score_threshold).flatten().tolist()
        pairs = match([proposal.boxes_xyxy[i].tolist() for i in kept], [a.box_xyxy for a in record.annotations])
        objects, matched = objects + len(record.annotations), matched + len(pairs)
        if not pairs:
            continue
        true = sorted({a.category for a in record.annotations})
        everything = detector.tag_probabilities(proposal, detector.vocabulary).argmax(dim=1)
        among_true = detector.tag_probabilities(proposal, true).argmax(dim=1)
        for box, target in pairs:
            tag = record.annotations[target].category
            right += detector.vocabulary[everything[kept[box]]] == tag
            right_among_true += true[among_true[kept[box]]] == tag
    return {
        "map50": at_50,
        "map": average_precision,
        "recall": matched / max(objects, 1),
        "tag_accuracy": right / max(matched, 1),
        "tag_accuracy_among_true": right_among_true / max(matched, 1),
    }


def of_segmenter(segmenter: "BoxSegmenter", records: Sequence[ImageRecord]) -> dict[str, float]:
    """Mean mask IoU over objects, prompted with their true boxes."""
    overlaps: list[float] = []
    for some in _batches([record for record in records if any(a.rle for a in record.annotations)]):
        truth = [[a for a in record.annotations if a.rle] for record in some]
        images: list[Image.Image] = [open_image(record.path) for record in some]
        boxes = [np.array([a.box_xyxy for a in of_image], np.float32) for of_image in truth]
        for masks_NHW, annotations in zip(segmenter.masks(images, boxes)[0], truth, strict=True):
            for mask, annotation in zip(masks_NHW, annotations, strict=True):
                overlaps.append(mask_iou(mask, decode(annotation.rle)))
    return {"mask_iou": float(np.mean(overlaps)) if overlaps else 0.0}


def match(found: Sequence[Sequence[float]], true: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs (found, true) at IoU ≥ 0.5, each box once, in the order of `found`."""
    if not found or not true:
        return []
    overlap = ops.box_iou(torch.tensor(found, dtype=torch.float32), torch.tensor(true, dtype=torch.float32))
    pairs = []
    for i in range(len(found)):
        best = int(overlap[i].argmax())
        if overlap[i, best] >= _SAME_OBJECT:
            pairs.append((i, best))
            overlap[:, best] = -1.0
    return pairs


def box_average_precision(
    records: Sequence[ImageRecord], found: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[float, float]:
    """COCO's AP (IoU 0.50:0.95) and AP50 of class-agnostic boxes (N, 4) xyxy with scores (N,)."""
    images = [{"id": i, "width": r.width, "height": r.height} for i, r in enumerate(records, start=1)]
    annotations: list[dict] = []
    results: list[dict] = []
    for i, (record, (boxes, scores)) in enumerate(zip(records, found, strict=True), start=1):
        for a in record.annotations:
            x, y, w, h = _xywh(a.box_xyxy)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "bbox": [x, y, w, h], "area": w * h}
                | {"iscrowd": 0}
            )
        results += [
            {"image_id": i, "category_id": 1, "bbox": list(_xywh(box)), "score": float(score)}
            for box, score in zip(boxes.tolist(), scores, strict=True)
        ]
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its tables
        truth = COCO()
        truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
        truth.createIndex()
        scorer = COCOeval(truth, truth.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return float(scorer.stats[0]), float(scorer.stats[1])


def decode(rle: dict | None) -> np.ndarray:
    """A COCO run-length encoding as a boolean mask (H, W)."""
    return coco_mask.decode(rle).astype(bool)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def _xywh(box_xyxy: Sequence[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box_xyxy
    return x0, y0, x1 - x0, y1 - y0


def _batches(records: Sequence[ImageRecord]) -> list[Sequence[ImageRecord]]:
    return [records[start : start + _BATCH] for start in range(0, len(records), _BATCH)]
