"""Visual refiner, second module: tags → boxes per tag, with a feature vector for each box (paper section 1).

One interface for every detector: a class-agnostic YOLO whose boxes are compared with the tags (`fitted`), a detector
file that the user names (`file`: YOLO, YOLO-World), Grounding DINO (`grounding_dino`), the ground truth
(`annotations`), which shows what a perfect detector would give, and `none`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import ops

from lyrics.config import DetectorPart
from lyrics.data.records import Annotation
from lyrics.foundation import detector, manifest, regions, yolo

if TYPE_CHECKING:
    from lyrics.foundation.detector_file import NamedDetector
    from lyrics.foundation.grounding_dino import GroundingDino

Annotations = Sequence[Sequence[Annotation]]
_MAX_BOXES = 300


@dataclasses.dataclass(frozen=True, kw_only=True)
class Detections:
    """Boxes of one picture, highest score first; N may be 0.

    Attributes:
        boxes_xyxy: (N, 4) float32, pixels of the picture.
        tag_index: (N,) int64, place of each box's tag among the tags asked for.
        score: (N,) float32, in [0, 1].
        features: (N, width) float32.
    """

    boxes_xyxy: np.ndarray
    tag_index: np.ndarray
    score: np.ndarray
    features: np.ndarray

    def __len__(self) -> int:
        return len(self.score)


class Detector(Protocol):
    """`annotations` holds the ground truth of each picture; only the oracle reads it."""

    width: int

    def detect(
        self,
        images: Sequence[Image.Image],
        tags_per_image: Sequence[Sequence[str]],
        annotations: Annotations | None = None,
    ) -> list[Detections]: ...


def load_detector(foundation: Path, config: DetectorPart, device: str | torch.device = "cpu") -> Detector:
    """The detector that lies in `foundation / "detector"`; thresholds come from `config`.

    Raises:
        InputError: the part, or the CLIP that it is compared through, is missing.
    """
    part = foundation / "detector"
    source = manifest.read(part)["source"]
    if source == "none":
        return NoDetector()
    if source == "annotations":
        return AnnotationDetector(foundation / "clip", device)
    if source == "grounding_dino":
        from lyrics.foundation.grounding_dino import GroundingDino

        return GroundedDetector(GroundingDino(part, device), config)
    if source == "file":
        from lyrics.foundation.detector_file import NamedDetector

        return FileDetector(NamedDetector(part, device), config)
    return RegionDetector(detector.load(part, foundation / "clip", device), config)


class NoDetector:
    """Switched off: no picture has a box."""

    width = 0

    def detect(
        self,
        images: Sequence[Image.Image],
        tags_per_image: Sequence[Sequence[str]],
        annotations: Annotations | None = None,
    ) -> list[Detections]:
        return [empty(0) for _ in images]


def _detections(boxes_xyxy: Tensor, tag_index: Tensor, score: Tensor, features: Tensor) -> Detections:
    boxes, tags, scores, described = (x.cpu().numpy() for x in (boxes_xyxy, tag_index, score, features))
    return Detections(boxes_xyxy=boxes, tag_index=tags, score=scores, features=described)


class RegionDetector:
    """Class-agnostic boxes, each given the tag of the picture that its region resembles most.

    A box's score is its objectness times the probability of its tag, against all other tags of the picture and all
    those that the detector was fitted on: an object that no tag of the picture fits gets a low score.
    """

    def __init__(self, regions: detector.RegionDetector, config: DetectorPart) -> None:
        self._regions, self._config = regions, config
        self.width = regions.width

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Image.Image],
        tags_per_image: Sequence[Sequence[str]],
        annotations: Annotations | None = None,
    ) -> list[Detections]:
        threshold = self._config.score_threshold
        proposals = self._regions.propose(images, score_threshold=threshold, nms_iou=self._config.nms_iou)
        found = []
        for proposal, tags in zip(proposals, tags_per_image, strict=True):
            if not tags or not len(proposal.objectness):
                found.append(empty(self.width))
                continue
            candidates = list(dict.fromkeys([*tags, *self._regions.vocabulary]))
            probability, index = self._regions.tag_probabilities(proposal, candidates)[:, : len(tags)].max(dim=1)
            score = proposal.objectness * probability
            order = torch.argsort(score, descending=True, stable=True)
            order = order[score[order] > threshold]
            found.append(_detections(proposal.boxes_xyxy[order], index[order], score[order], proposal.features[order]))
        return found


class FileDetector:
    """A detector of the user's: classes that carry the names of tags, or (YOLO-World) any tag."""

    def __init__(self, model: "NamedDetector", config: DetectorPart) -> None:
        self._model, self._config = model, config
        self.width = model.width

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Image.Image],
        tags_per_image: Sequence[Sequence[str]],
        annotations: Annotations | None = None,
    ) -> list[Detections]:
        if not any(tags_per_image):
            return [empty(self.width) for _ in images]
        pixels, scales = regions.letterbox(images, self._model.size_px)
        predictions, maps = self._model.predict(pixels, tags_per_image)
        found = yolo.nms(predictions, self._config.score_threshold, self._config.nms_iou, _MAX_BOXES)
        features = regions.pool(maps, [one[:, :4] for one in found], self._model.size_px, 1).flatten(1)
        detections = []
        for one, feature, image, scale in zip(
            found, features.split([len(one) for one in found]), images, scales, strict=True
        ):
            limit = torch.tensor([image.width, image.height] * 2, device=one.device)
            detections.append(
                _detections(
                    (one[:, :4] / scale).clamp(min=0).minimum(limit), one[:, 5].long(), one[:, 4], feature.float()
                )
            )
        return detections


class GroundedDetector:
    """Grounding DINO: the tags are its text, and a box is described by the query that found it."""

    def __init__(self, model: "GroundingDino", config: DetectorPart) -> None:
        self._model, self._config = model, config
        self.width = model.width

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Image.Image],
        tags_per_image: Sequence[Sequence[str]],
        annotations: Annotations | None = None,
    ) -> list[Detections]:
        found = []
        for image, looks in zip(images, self._model.predict(images, tags_per_image), strict=True):
            if not looks:
                found.append(empty(self.width))
                continue
            score, index = torch.cat([look.scores_QT for look in looks]).max(dim=1)
            order = torch.argsort(score, descending=True, stable=True)[:_MAX_BOXES]
            order = order[score[order] > self._config.score_threshold]
            limit = torch.tensor([image.width, image.height] * 2, device=score.device)
            boxes_xyxy = torch.cat([look.boxes_xyxy for look in looks])[order]
            found.append(
                _detections(
                    boxes_xyxy.clamp(min=0).minimum(limit),
                    index[order],
                    score[order],
                    torch.cat([look.features_QD for look in looks])[order],
                )
            )
        return found


class AnnotationDetector:
    """The oracle: boxes of the annotations whose category is among the tags; none where there are no annotations."""

    def __init__(self, clip: Path, device: str | torch.device = "cpu") -> None:
        from lyrics.model.vision import load_image_encoder

        self._device = torch.device(device)
        self._encoder = load_image_encoder(clip).to(self._device)
        self.width = self._encoder.region_width

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Image.Image],
        tags_per_image: Sequence[Sequence[str]],
        annotations: Annotations | None = None,
    ) -> list[Detections]:
        truth = annotations if annotations is not None else [()] * len(images)
        kept = [
            [(a.box_xyxy, list(tags).index(a.category)) for a in of_image if a.category in tags]
            for of_image, tags in zip(truth, tags_per_image, strict=True)
        ]
        if not any(kept):
            return [empty(self.width) for _ in images]
        boxes = [torch.tensor([box for box, _ in rows], dtype=torch.float32).reshape(-1, 4) for rows in kept]
        # The encoder sees the whole picture as a square: boxes are scaled along each axis on its own.
        fractions = [b / torch.tensor([i.width, i.height] * 2) for b, i in zip(boxes, images, strict=True)]
        pooled = [_pool(m, fractions) for m in self._encoder.region_maps(images, self._device)]
        features = torch.cat(pooled, dim=1).cpu().split([len(b) for b in boxes])
        return [
            Detections(
                boxes_xyxy=box.numpy(),
                tag_index=np.array([index for _, index in rows], np.int64),
                score=np.ones(len(rows), np.float32),
                features=feature.numpy(),
            )
            for box, rows, feature in zip(boxes, kept, features, strict=True)
        ]


def _pool(map_BCHW: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """RoIAlign of a map inside boxes in fractions of the picture, to one cell each: (all boxes, C)."""
    size = torch.tensor([map_BCHW.shape[3], map_BCHW.shape[2]] * 2)
    cells = [(box_N4 * size).to(map_BCHW) for box_N4 in boxes]
    return ops.roi_align(map_BCHW, cells, 1, 1.0, sampling_ratio=2, aligned=True).flatten(1)


def empty(width: int) -> Detections:
    """No box at all."""
    return Detections(
        boxes_xyxy=np.zeros((0, 4), np.float32),
        tag_index=np.zeros(0, np.int64),
        score=np.zeros(0, np.float32),
        features=np.zeros((0, width), np.float32),
    )
