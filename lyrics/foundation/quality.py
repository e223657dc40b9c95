"""What the fitted detector and segmenter do on scenes that no part was fitted on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision import ops

from lyrics.config import DetectorPart
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.foundation import masks
from lyrics.foundation.average_precision import average_precision, results_of, truth_of

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
    results = [
        result
        for number, proposal in enumerate(proposals, start=1)
        for result in results_of(number, proposal.boxes_xyxy.tolist(), proposal.objectness.tolist())
    ]
    found = average_precision(truth_of(records), results)
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
        "map50": found["AP50"] or 0.0,
        "map": found["AP"] or 0.0,
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
        for image, found, annotations in zip(images, segmenter.masks(images, boxes)[0], truth, strict=True):
            for counts, annotation in zip(found, annotations, strict=True):
                mask_HW = masks.decode(counts, image.height, image.width)
                overlaps.append(mask_iou(mask_HW, decode(annotation.rle)))
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


def decode(rle: dict | None) -> np.ndarray:
    """A COCO run-length encoding as a boolean mask (H, W)."""
    return coco_mask.decode(rle).astype(bool)


def mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    union = np.logical_or(a, b).sum()
    return float(np.logical_and(a, b).sum() / union) if union else 1.0


def _batches(records: Sequence[ImageRecord]) -> list[Sequence[ImageRecord]]:
    return [records[start : start + _BATCH] for start in range(0, len(records), _BATCH)]
