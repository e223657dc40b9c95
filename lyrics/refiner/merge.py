"""From tags × boxes × scores to a picture's objects: thresholded, each thing once, in one order."""

import dataclasses

import numpy as np
import torch
from torchvision import ops

from lyrics.refiner.detection import Detections

_MIN_SIDE_PX = 1.0


def merge(
    detections: Detections,
    size: tuple[int, int],
    *,
    score_threshold: float,
    nms_iou: float | None,
    max_objects: int,
) -> Detections:
    """The best detections of one picture.

    Boxes are clipped to the picture; those below the threshold, thinner than a pixel or not finite go. Of boxes that
    overlap by more than `nms_iou` the best stays, whatever their tags: one thing found under two names is one object.

    Args:
        size: width and height of the picture, pixels.
        nms_iou: None keeps boxes that overlap (the ground truth has such objects).

    Returns:
        At most `max_objects`, by falling score; equal scores by falling area, then by coordinates and tag, so that the
        order does not depend on the detector's.
    """
    boxes = np.clip(detections.boxes_xyxy.astype(np.float32), 0, np.array([*size, *size], np.float32))
    sides = boxes[:, 2:] - boxes[:, :2]
    usable = np.isfinite(detections.boxes_xyxy).all(1) & (detections.score >= score_threshold)
    rows = np.flatnonzero(usable & (sides >= _MIN_SIDE_PX).all(1))
    keys = (detections.tag_index, *boxes.T[::-1], -sides.prod(1), -detections.score)
    rows = rows[np.lexsort([key[rows] for key in keys])]
    if nms_iou is not None:
        # Falling stand-in scores keep our order where torchvision would be free to choose among equals.
        order = torch.arange(len(rows), 0, -1, dtype=torch.float32)
        rows = rows[ops.nms(torch.from_numpy(boxes[rows]), order, nms_iou).numpy()]
    rows = rows[:max_objects]
    return dataclasses.replace(
        detections,
        boxes_xyxy=boxes[rows],
        tag_index=detections.tag_index[rows],
        score=detections.score[rows],
        features=detections.features[rows],
    )
