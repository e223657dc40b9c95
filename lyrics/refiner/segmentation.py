"""Visual refiner, third module: boxes → masks, with a feature vector for each mask (paper section 1).

One interface for every segmenter: a small Sam fitted here (`fitted`), published Segment Anything weights (`hub`), the
ground truth (`annotations`), which shows what a perfect segmenter would give, and `none`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import ops

from lyrics.data.records import Annotation
from lyrics.foundation import manifest, masks, sam, segmenter
from lyrics.model.pictures import once

Annotations = Sequence[Sequence[Annotation]]
_SAME_OBJECT = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segments:
    """One mask for each box of one picture, in the order of the boxes; N may be 0.

    Attributes:
        masks: N compressed COCO counts at the picture's size; empty strings from no segmenter.
        features: (N, width) float32; width is 0 from no segmenter.
    """

    masks: tuple[str, ...]
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


def load_segmenter(foundation: Path, device: str | torch.device = "cpu") -> Segmenter:
    """The segmenter that lies in `foundation / "segmenter"`.

    Raises:
        InputError: the part is missing.
    """
    part = foundation / "segmenter"
    source = manifest.read(part)["source"]
    if source == "none":
        return NoSegmenter()
    if source == "annotations":
        return AnnotationSegmenter(foundation / "clip", device)
    if source == "hub":
        return HubSegmenter(part, device)
    return BoxSegmenter(segmenter.load(part, device))


class NoSegmenter:
    """Switched off: boxes have neither masks nor features under them."""

    width = 0

    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]:
        return [
            Segments(masks=("",) * len(boxes), features=np.zeros((len(boxes), 0), np.float32))
            for boxes in boxes_per_image
        ]


class BoxSegmenter:
    """The small Sam: all pictures of a batch, then all their boxes at once."""

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
        found, features = self._model.masks(images, boxes_per_image)
        return [Segments(masks=m, features=f) for m, f in zip(found, features, strict=True)]


class HubSegmenter:
    """Published Segment Anything weights, through transformers: pictures in a batch, the boxes of each in one call."""

    def __init__(self, part: Path, device: str | torch.device = "cpu") -> None:
        from transformers import SamImageProcessor, SamModel

        self._processor: Any = SamImageProcessor.from_pretrained(part, local_files_only=True)
        model: Any = SamModel.from_pretrained(part, local_files_only=True, dtype=torch.float32)
        self._model = model.to(device).eval()
        self._device = torch.device(device)
        self._side: int = model.config.vision_config.image_size
        self.width: int = model.config.vision_config.output_channels

    @torch.inference_mode()
    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]:
        found = [nothing(self.width)] * len(images)
        seen = [i for i, boxes in enumerate(boxes_per_image) if len(boxes)]  # pictures without a box cost nothing
        if not seen:
            return found
        inputs = once(images, ("segment anything", self._side), self._preprocess, ahead=True)
        embeddings_BCHW = self._model.get_image_embeddings(inputs["pixel_values"][seen].to(self._device))
        for i, embedding_CHW, resized in zip(seen, embeddings_BCHW, inputs["reshaped_input_sizes"][seen], strict=True):
            boxes_N4 = torch.from_numpy(np.asarray(boxes_per_image[i], np.float32))
            found[i] = self._segment_one(images[i], boxes_N4, embedding_CHW[None], resized.tolist())
        return found

    def _preprocess(self, images: Sequence[Image.Image]) -> Any:
        return self._processor(images=[image.convert("RGB") for image in images], return_tensors="pt")

    def _segment_one(
        self, image: Image.Image, boxes_N4: Tensor, embedding_1CHW: Tensor, resized: tuple[int, int]
    ) -> Segments:
        height, width = resized
        prompts_N4 = (boxes_N4 * torch.tensor([width / image.width, height / image.height] * 2)).to(self._device)
        output = self._model(image_embeddings=embedding_1CHW, input_boxes=prompts_N4[None], multimask_output=False)
        # The picture fills the top left of the square that the encoder saw, and of the square of the masks.
        logits_Nhw = segmenter.upscale(output.pred_masks[0, :, 0].float(), self._side)[:, :height, :width]
        side, longest = embedding_1CHW.shape[-1], max(resized)
        rows, columns = (max(1, round(side * n / longest)) for n in resized)
        features = sam.average_under(
            embedding_1CHW[:, :, :rows, :columns].float(), [logits_Nhw > 0], [prompts_N4.to(logits_Nhw)]
        )
        return Segments(masks=masks.from_logits(logits_Nhw, image.height, image.width), features=features.cpu().numpy())


class AnnotationSegmenter:
    """The oracle: the mask of the annotation that a box belongs to (IoU ≥ 0.5); the box itself where there is none."""

    def __init__(self, clip: Path, device: str | torch.device = "cpu") -> None:
        from lyrics.model.vision import load_image_encoder

        self._device = torch.device(device)
        self._encoder = load_image_encoder(clip).to(self._device)
        self.width = self._encoder.region_width

    @torch.inference_mode()
    def segment(
        self,
        images: Sequence[Image.Image],
        boxes_per_image: Sequence[np.ndarray],
        annotations: Annotations | None = None,
    ) -> list[Segments]:
        if not any(len(boxes) for boxes in boxes_per_image):
            return [nothing(self.width) for _ in images]
        truth = annotations if annotations is not None else [()] * len(images)
        boxes_per = [torch.from_numpy(np.asarray(boxes, np.float32).reshape(-1, 4)) for boxes in boxes_per_image]
        maps = [map_BCHW.cpu() for map_BCHW in self._encoder.region_maps(images, self._device)]
        found = []
        for row, (image, boxes_N4, annotated) in enumerate(zip(images, boxes_per, truth, strict=True)):
            true_NHW = _true_masks(image, boxes_N4, annotated)
            under = [sam.average_under(m[row, None], [torch.from_numpy(true_NHW)], [boxes_N4]) for m in maps]
            features = torch.cat(under, dim=1)
            found.append(Segments(masks=masks.encode(true_NHW), features=features.numpy()))
        return found


def _true_masks(image: Image.Image, boxes_N4: Tensor, annotations: Sequence[Annotation]) -> np.ndarray:
    found_NHW = np.zeros((len(boxes_N4), image.height, image.width), bool)
    true_M4 = torch.tensor([a.box_xyxy for a in annotations], dtype=torch.float32).reshape(-1, 4)
    overlap_NM = ops.box_iou(boxes_N4, true_M4)
    for mask_HW, box, overlap_M in zip(found_NHW, boxes_N4.tolist(), overlap_NM, strict=True):
        best = int(overlap_M.argmax()) if len(annotations) else -1
        rle = annotations[best].rle if best >= 0 and overlap_M[best] >= _SAME_OBJECT else None
        if rle is not None:
            mask_HW |= masks.decode(rle["counts"], image.height, image.width)
            continue
        x0, y0 = int(max(box[0], 0)), int(max(box[1], 0))
        mask_HW[y0 : max(y0 + 1, round(box[3])), x0 : max(x0 + 1, round(box[2]))] = True
    return found_NHW


def nothing(width: int) -> Segments:
    """No mask at all."""
    return Segments(masks=(), features=np.zeros((0, width), np.float32))
