"""How well the refiner agrees with annotations: boxes, tags on matched boxes, masks from predicted boxes."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torchvision import ops

from lyrics.data.records import Annotation, ImageRecord
from lyrics.foundation.average_precision import average_precision, results_of, truth_of
from lyrics.refiner.features import RefinedImage

MATCH_IOU = 0.5
_AP_IMAGES = 5000  # as COCO's own val: COCOeval holds every pair of boxes, so more would let memory grow with the data
_AP_NAMES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
Pairs = Iterable[tuple[RefinedImage, Sequence[Annotation]]]


@dataclasses.dataclass
class _Counts:
    objects: int = 0
    predicted: int = 0
    matched: int = 0
    tags_right: int = 0
    masks: int = 0
    mask_iou: float = 0.0


def measure(images: Pairs) -> dict[str, float | None]:
    """Predictions matched one to one, by falling score, to the annotation they overlap most, at IoU ≥ 0.5.

    Returns:
        `box_recall` and `box_precision` whatever the tag, `recall` and `precision` where the tag is right too,
        `tag_accuracy` on matched boxes, `mask_iou` averaged over matched boxes with an annotated mask; then the
        `coco_figures`. None where there is nothing to divide by.
    """
    counts = _Counts()
    first: list[tuple[RefinedImage, Sequence[Annotation]]] = []
    for image, annotations in images:
        _add(counts, image, annotations)
        if len(first) < _AP_IMAGES:
            first.append((image, annotations))
    return {
        "box_recall": _ratio(counts.matched, counts.objects),
        "box_precision": _ratio(counts.matched, counts.predicted),
        "recall": _ratio(counts.tags_right, counts.objects),
        "precision": _ratio(counts.tags_right, counts.predicted),
        "tag_accuracy": _ratio(counts.tags_right, counts.matched),
        "mask_iou": _ratio(counts.mask_iou, counts.masks),
        **coco_figures(first),
    }


def coco_figures(pairs: Sequence[tuple[RefinedImage, Sequence[Annotation]]]) -> dict[str, float | None]:
    """COCO's average precision of boxes with their tags (`box_ap`, `box_ap50` …) and of masks (`mask_ap`).

    Of what the refiner keeps: boxes above its threshold, at most `max_objects` a picture. `mask_ap` is None unless all
    annotations and objects have a mask.
    """
    records = [
        ImageRecord(
            image_id=image.image_id, path=image.path, width=image.width, height=image.height, annotations=tuple(truth)
        )
        for image, truth in pairs
    ]
    names = sorted({one.category for record in records for one in record.annotations})
    category_ids = {name: number for number, name in enumerate(names, start=1)}
    truth = truth_of(records, category_ids)
    results = []
    for number, (image, _) in enumerate(pairs, start=1):
        categories = [category_ids.get(tag, 0) for tag in image.tags]  # 0 is none of them
        found = results_of(number, image.boxes_xyxy, image.scores, categories)
        for result, counts in zip(found, image.masks, strict=True):
            result["segmentation"] = {"size": [image.height, image.width], "counts": counts}
        results += found
    boxes = average_precision(truth, [_without(one, "segmentation") for one in results])
    figures = {f"box_{name.lower()}": boxes[name] for name in _AP_NAMES} | {"mask_ap": None}
    if all("segmentation" in one for one in truth["annotations"]) and all(r["segmentation"]["counts"] for r in results):
        figures["mask_ap"] = average_precision(truth, [_without(one, "bbox") for one in results], "segm")["AP"]
    return figures


def _without(result: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != key}


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
        truth, mask = annotations[annotated], image.masks[predicted]
        counts.tags_right += image.tags[predicted] == truth.category
        if truth.rle is not None and mask:
            found = {"size": [image.height, image.width], "counts": mask}
            counts.masks += 1
            counts.mask_iou += float(coco_mask.iou([found], [truth.rle], [0])[0, 0])


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
