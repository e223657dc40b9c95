"""Visual refiner (paper section 3.1.1): picture → tags → boxes → masks → spatial text and local features."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lyrics.config import DetectorPart, Refine, TaggerPart
from lyrics.refiner.detection import Annotations, Detector, load_detector
from lyrics.refiner.merge import merge
from lyrics.refiner.segmentation import Segmenter, load_segmenter
from lyrics.refiner.spatial_text import format_objects
from lyrics.refiner.tagging import Tagger, load_tagger


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefinedObjects:
    """What the refiner found in one picture; N objects by falling score, N may be 0.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels.
        masks: N compressed COCO counts at the size of the picture; empty strings without a segmenter.
        detector_tokens_ND: float32, detector features pooled in each box.
        segmenter_tokens_ND: float32, segmenter features averaged under each mask.
    """

    tags: tuple[str, ...]
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    masks: tuple[str, ...]
    detector_tokens_ND: np.ndarray
    segmenter_tokens_ND: np.ndarray
    spatial_text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refiner:
    """The three modules one after the other. `nms_iou` None keeps overlapping boxes, as an oracle's must be."""

    tagger: Tagger
    detector: Detector
    segmenter: Segmenter
    settings: Refine
    score_threshold: float
    nms_iou: float | None

    @torch.inference_mode()
    def refine(self, images: Sequence[Image.Image], annotations: Annotations | None = None) -> list[RefinedObjects]:
        """Refine a batch of pictures of any sizes.

        Args:
            annotations: ground truth of each picture, which only `annotations` backends read.
        """
        if not images:
            return []
        tags_per_image = self.tagger.tag(images, annotations)
        found = [
            merge(
                detections,
                image.size,
                score_threshold=self.score_threshold,
                nms_iou=self.nms_iou,
                max_objects=self.settings.max_objects,
            )
            for image, detections in zip(images, self.detector.detect(images, tags_per_image, annotations), strict=True)
        ]
        segments = self.segmenter.segment(images, [detections.boxes_xyxy for detections in found], annotations)
        refined = []
        for image, tags, detections, of_image in zip(images, tags_per_image, found, segments, strict=True):
            names = tuple(tags[index] for index in detections.tag_index)
            size = np.array([*image.size, *image.size], np.float64)
            refined.append(
                RefinedObjects(
                    tags=names,
                    boxes_xyxy=detections.boxes_xyxy,
                    scores=detections.score,
                    masks=of_image.masks,
                    detector_tokens_ND=detections.features,
                    segmenter_tokens_ND=of_image.features,
                    spatial_text=format_objects(names, detections.boxes_xyxy / size, self.settings.coordinate_format),
                )
            )
        return refined


def load_refiner(
    foundation: Path,
    settings: Refine,
    tagger: TaggerPart,
    detector: DetectorPart,
    device: str | torch.device = "cpu",
) -> Refiner:
    """The refiner made of the parts that lie in `foundation`, with the thresholds of `tagger` and `detector`.

    Raises:
        InputError: a part is missing.
    """
    oracle = detector.source == "annotations"
    return Refiner(
        tagger=load_tagger(foundation, tagger, device),
        detector=load_detector(foundation, detector, device),
        segmenter=load_segmenter(foundation, device),
        settings=settings,
        score_threshold=detector.score_threshold,
        nms_iou=None if oracle else detector.nms_iou,
    )
