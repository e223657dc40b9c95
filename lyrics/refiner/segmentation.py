"""Visual refiner, third module: boxes → masks, with a feature vector for each mask (paper section 1).

One interface for every segmenter: a small Sam fitted here (`fitted`), published Segment Anything weights (`hub`), and
the ground truth (`annotations`), which shows what a perfect segmenter would give.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision import ops

from lyrics.config import SegmenterPart
from lyrics.data.records import Annotation
from lyrics.foundation import manifest, sam, segmenter

Annotations = Sequence[Sequence[Annotation]]
_SAME_OBJECT = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """One mask for each box of one picture, in the order of the boxes; N may be 0.

    Attributes:
        masks: (N, height, width) bool, at the picture's size.
        features: (N, width) float32.
    """

    masks: np.ndarray
    features: np.ndarray


class Segmenter(Protocol):
    """`boxes_per_image` are (N, 4) xyxy pixels; `annotations` holds the ground truth, which only the oracle reads."""

    width: int

    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]: ...


def load_segmenter(foundation: Path, config: SegmenterPart, device: str | torch.device = "cpu") -> Segmenter:
    """The segmenter that lies in `foundation / "segmenter"`.

    Raises:
        InputError: the part is missing.
    """
    part = foundation / "segmenter"
    source = manifest.read(part)["source"]
    if source == "annotations":
        return AnnotationSegmenter(foundation / "clip")
    if source == "hub":
        return HubSegmenter(part, device)
    return BoxSegmenter(segmenter.load(part, device))


class BoxSegmenter:
    """The small Sam."""

    def __init__(self, model: segmenter.BoxSegmenter) -> None:
        self._model, self.width = model, model.width

    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]:
        if not images:
            return []
        masks, features = self._model.masks(images, boxes_per_image)
        return [Segments(masks=m, features=f) for m, f in zip(masks, features, strict=True)]


class HubSegmenter:
    """Published Segment Anything weights, through transformers: pictures in a batch, boxes picture by picture."""

    def __init__(self, part: Path, device: str | torch.device = "cpu") -> None:
        from transformers import SamImageProcessor, SamModel

        self._processor: Any = SamImageProcessor.from_pretrained(part, local_files_only=True)
        model: Any = SamModel.from_pretrained(part, local_files_only=True, dtype=torch.float32)
        self._model = model.to(device).eval()
        self._device = torch.device(device)
        self.width: int = model.config.vision_config.output_channels

    @torch.inference_mode()
    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]:
        if not any(len(boxes) for boxes in boxes_per_image):
            return [nothing(image, self.width) for image in images]
        inputs = self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        embeddings_BCHW = self._model.get_image_embeddings(inputs["pixel_values"].to(self._device))
        found = []
        for i, (image, boxes) in enumerate(zip(images, boxes_per_image, strict=True)):
            if not len(boxes):
                found.append(nothing(image, self.width))
                continue
            original, resized = inputs["original_sizes"][i : i + 1], inputs["reshaped_input_sizes"][i : i + 1]
            scale = torch.tensor([resized[0, 1] / image.width, resized[0, 0] / image.height] * 2)
            prompts_N4 = (torch.from_numpy(np.asarray(boxes, np.float32)) * scale).to(self._device)
            output = self._model(
                image_embeddings=embeddings_BCHW[i : i + 1], input_boxes=prompts_N4[None], multimask_output=False
            )
            (masks_N1HW,) = self._processor.post_process_masks(output.pred_masks.cpu(), original, resized)
            masks_NHW = masks_N1HW[:, 0]
            # The picture fills the top left of the square that the encoder saw.
            side = embeddings_BCHW.shape[-1]
            longest = int(resized.max())
            rows, columns = (max(1, round(side * int(n) / longest)) for n in resized[0])
            map_1CHW = embeddings_BCHW[i : i + 1, :, :rows, :columns].float().cpu()
            features = sam.average_under(map_1CHW, [masks_NHW], [torch.from_numpy(np.asarray(boxes, np.float32))])
            found.append(Segments(masks=masks_NHW.numpy(), features=features.numpy()))
        return found


class AnnotationSegmenter:
    """The oracle: the mask of the annotation that a box belongs to (IoU ≥ 0.5); the box itself where there is none."""

    def __init__(self, clip: Path) -> None:
        from lyrics.model.vision import load_image_encoder

        self._encoder = load_image_encoder(clip)
        self.width = self._encoder.width

    @torch.inference_mode()
    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]:
        if not any(len(boxes) for boxes in boxes_per_image):
            return [nothing(image, self.width) for image in images]
        truth = annotations if annotations is not None else [()] * len(images)
        boxes_per = [torch.from_numpy(np.asarray(boxes, np.float32).reshape(-1, 4)) for boxes in boxes_per_image]
        masks = [_true_masks(image, b, t) for image, b, t in zip(images, boxes_per, truth, strict=True)]
        map_BDHW = self._encoder.feature_map(self._encoder(self._encoder.preprocess(images))).float().cpu()
        features = sam.average_under(map_BDHW, [torch.from_numpy(m) for m in masks], boxes_per)
        return [
            Segments(masks=m, features=f.numpy())
            for m, f in zip(masks, features.split([len(b) for b in boxes_per]), strict=True)
        ]


def _true_masks(image: Image.Image, boxes_N4: Tensor, annotations: Sequence[Annotation]) -> np.ndarray:
    masks = np.zeros((len(boxes_N4), image.height, image.width), bool)
    true_M4 = torch.tensor([a.box_xyxy for a in annotations], dtype=torch.float32).reshape(-1, 4)
    overlap_NM = ops.box_iou(boxes_N4, true_M4)
    for mask, box, overlap_M in zip(masks, boxes_N4.tolist(), overlap_NM, strict=True):
        best = int(overlap_M.argmax()) if len(annotations) else -1
        rle = annotations[best].rle if best >= 0 and overlap_M[best] >= _SAME_OBJECT else None
        if rle is not None:
            mask |= coco_mask.decode(rle).astype(bool)
            continue
        x0, y0 = int(max(box[0], 0)), int(max(box[1], 0))
        mask[y0 : max(y0 + 1, round(box[3])), x0 : max(x0 + 1, round(box[2]))] = True
    return masks


def nothing(image: Image.Image, width: int) -> Segments:
    """No mask at all."""
    return Segments(masks=np.zeros((0, image.height, image.width), bool), features=np.zeros((0, width), np.float32))
