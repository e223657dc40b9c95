"""How well the refiner agrees with annotations: boxes, tags on matched boxes, masks from predicted boxes."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision import ops

from lyrics.data.records import Annotation
from lyrics.refiner.features import RefinedImage

MATCH_IOU = 0.5


@dataclasses.dataclass
class _Counts:
    objects: int = 0
    predicted: int = 0
    matched: int = 0
    tags_right: int = 0
    mask_ious: list[float] = dataclasses.field(default_factory=list)


def measure(images: Iterable[tuple[RefinedImage, Sequence[Annotation]]]) -> dict[str, float | None]:
    """Predictions matched one to one, by falling score, to the annotation they overlap most, at IoU ≥ 0.5.

    Returns:
        `box_recall` and `box_precision` whatever the tag, `recall` and `precision` where the tag is right too,
        `tag_accuracy` on matched boxes, `mask_iou` averaged over matched boxes with an annotated mask; None where there
        is nothing to divide by.
    """
    counts = _Counts()
    for image, annotations in images:
        _add(counts, image, annotations)
    return {
        "box_recall": _ratio(counts.matched, counts.objects),
        "box_precision": _ratio(counts.matched, counts.predicted),
        "recall": _ratio(counts.tags_right, counts.objects),
        "precision": _ratio(counts.tags_right, counts.predicted),
        "tag_accuracy": _ratio(counts.tags_right, counts.matched),
        "mask_iou": _ratio(sum(counts.mask_ious), len(counts.mask_ious)),
    }


def match(predicted_N4: np.ndarray, annotated_M4: np.ndarray) -> list[tuple[int, int]]:
    """(prediction, annotation) pairs; each is used once, earlier predictions choose first."""
    if not len(predicted_N4) or not len(annotated_M4):
        return []
    iou = ops.box_iou(torch.from_numpy(predicted_N4).double(), torch.from_numpy(annotated_M4).double()).numpy()
    pairs = []
    for row, of_prediction in enumerate(iou):
        best = int(of_prediction.argmax())
        if of_prediction[best] >= MATCH_IOU:
            pairs.append((row, best))
            iou[:, best] = -1.0
    return pairs


def _add(counts: _Counts, image: RefinedImage, annotations: Sequence[Annotation]) -> None:
    counts.objects += len(annotations)
    counts.predicted += len(image.tags)
    pairs = match(
        np.asarray(image.boxes_xyxy, np.float64).reshape(-1, 4),
        np.asarray([a.box_xyxy for a in annotations], np.float64).reshape(-1, 4),
    )
    counts.matched += len(pairs)
    for predicted, annotated in pairs:
        truth = annotations[annotated]
        counts.tags_right += image.tags[predicted] == truth.category
        if truth.rle is not None:
            found = {"size": [image.height, image.width], "counts": image.masks[predicted]}
            counts.mask_ious.append(float(coco_mask.iou([found], [truth.rle], [0])[0, 0]))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
