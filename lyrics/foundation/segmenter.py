"""Foundation part `segmenter`: box → mask with Segment Anything; small and fitted here, or published weights.

Files: segmenter.json (what to build) and sam.safetensors (`fitted`), or the hub's own files (`hub`).
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lyrics import seeding
from lyrics.config import Config
from lyrics.data.annotated import read_split
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.errors import InputError
from lyrics.foundation import masks, sam, training
from lyrics.foundation.manifest import Made, count_parameters
from lyrics.foundation.regions import letterbox
from lyrics.io import read_json, write_json
from lyrics.stage import Tracker

SETTINGS, WEIGHTS = "segmenter.json", "sam.safetensors"
_JITTER = 0.05  # of a box's side: predicted boxes are never exact


def small(image_size_px: int) -> sam.SamSize:
    """The `sam-small` that is fitted here: a grid of 16 × 16 and masks of 64 × 64 at 128 px."""
    return sam.SamSize(
        image_size_px=image_size_px,
        patch_size_px=8,
        width=64,
        layers=2,
        heads=2,
        embedding=64,
        detail=16,
        decoder_layers=1,
        decoder_heads=4,
        decoder_mlp=128,
    )


class BoxSegmenter:
    """A small Sam with its pictures and boxes in batches."""

    def __init__(self, model: sam.BoxSam, size_px: int, device: str | torch.device = "cpu") -> None:
        self.model, self._size_px, self._device = model.to(device).eval(), size_px, torch.device(device)
        self.width: int = model.sam.prompt_encoder.embed_dim

    @torch.inference_mode()
    def masks(
        self, images: Sequence[Image.Image], boxes_per_image: Sequence[np.ndarray]
    ) -> tuple[list[tuple[str, ...]], list[np.ndarray]]:
        """Masks (N compressed COCO counts at each picture's size) and features (N, width) float32; N may be 0."""
        pixels, scales = letterbox(images, self._size_px)
        boxes = [
            torch.as_tensor(np.asarray(box, np.float32).reshape(-1, 4) * scale).to(self._device)
            for box, scale in zip(boxes_per_image, scales, strict=True)
        ]
        counts = [len(one) for one in boxes]
        embeddings, details = self.model.encode(pixels.to(self._device))
        logits = upscale(self.model.decode(embeddings, details, boxes), self._size_px).split(counts)
        features = sam.average_under(embeddings, [one > 0 for one in logits], boxes)
        found = [_at_size(one, image, scale) for one, image, scale in zip(logits, images, scales, strict=True)]
        return found, [one.float().cpu().numpy() for one in features.split(counts)]


def upscale(logits_RHW: Tensor, size_px: int) -> Tensor:
    if not len(logits_RHW):
        return logits_RHW.new_zeros(0, size_px, size_px)
    return F.interpolate(logits_RHW[:, None], (size_px, size_px), mode="bilinear", align_corners=False)[:, 0]


def _at_size(logits_NSS: Tensor, image: Image.Image, scale: float) -> tuple[str, ...]:
    """Cut the padding off and bring the masks to the size of the picture."""
    width, height = image.size
    inside = logits_NSS[:, : max(1, round(height * scale)), : max(1, round(width * scale))]
    return masks.from_logits(inside, height, width) if len(inside) else ()


def load(part: Path, device: str | torch.device = "cpu") -> BoxSegmenter:
    settings = read_json(part / SETTINGS)
    size = sam.SamSize(**settings["size"])
    model = sam.BoxSam(size)
    model.load_state_dict(load_file(part / WEIGHTS))
    return BoxSegmenter(model, size.image_size_px, device)


def fit(config: Config, work: Path, tracker: Tracker) -> Made:
    part, out = config.foundation.segmenter, work / "out"
    if part.source in ("annotations", "none"):
        write_json(out / SETTINGS, {"source": part.source})
        return Made(source=part.source, name=part.name, parameters=0, licence="none: it has no weights")
    if part.source == "hub":
        return _fetch(part.name, part.revision, out)
    return _fit(config, work, tracker)


def _fit(config: Config, work: Path, tracker: Tracker) -> Made:
    from lyrics.foundation import quality
    from lyrics.foundation.fit import SPLIT

    part, out = config.foundation.segmenter, work / "out"
    device = training.pick_device(config.device)
    with_masks = [image for image in read_split(SPLIT).images if any(a.rle for a in image.annotations)]
    if not with_masks:
        raise InputError(f"{SPLIT}/instances.json has no masks; a segmenter cannot be fitted on boxes alone")
    fitted, held_out = training.hold_out(with_masks)
    size = small(part.image_size_px)
    data = _Data(fitted, part.image_size_px)
    with training.deterministic(config.seed, "segmenter"):
        model = sam.BoxSam(size).to(device)
        order = torch.cat([torch.randperm(len(fitted)) for _ in range(part.epochs)])
        chunks = order.split(part.batch_size)
        generator = seeding.rng(config.seed, "foundation", "segmenter", "jitter")

        def losses_at(step: int) -> dict[str, Tensor]:
            pixels, boxes, masks = data.batch(chunks[step].tolist(), generator)
            boxes = [box.to(device) for box in boxes]
            logits = model.decode(*model.encode(pixels.to(device)), boxes)
            return mask_losses(upscale(logits.float(), part.image_size_px), masks.to(device))

        training.train(
            model,
            part="segmenter",
            steps=len(chunks),
            lr=part.lr,
            losses_at=losses_at,
            device=device,
            tracker=tracker,
        )
    write_json(out / SETTINGS, {"source": part.source, "size": dataclasses.asdict(size)})
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, out / WEIGHTS)
    return Made(
        source=part.source,
        name=part.name,
        parameters=training.parameter_count(model),
        quality=quality.of_segmenter(BoxSegmenter(model, part.image_size_px, device), held_out),
    )


def mask_losses(logits_RSS: Tensor, masks_RSS: Tensor) -> dict[str, Tensor]:
    """Cross-entropy of the pixels, and Dice, which does not care how small an object is."""
    probability = logits_RSS.sigmoid().flatten(1)
    target = masks_RSS.flatten(1)
    overlap = 2 * (probability * target).sum(dim=1) + 1
    dice = 1 - overlap / (probability.sum(dim=1) + target.sum(dim=1) + 1)
    pixel = F.binary_cross_entropy_with_logits(logits_RSS.flatten(1), target, reduction="none")
    return {"dice_loss": dice.mean(), "pixel_loss": pixel.mean() * 5}


class _Data:
    """Pictures as bytes, boxes and masks in the network's square, in memory."""

    def __init__(self, records: Sequence[ImageRecord], size_px: int) -> None:
        from lyrics.foundation.quality import decode

        self._pixels = torch.empty(len(records), 3, size_px, size_px, dtype=torch.uint8)
        self._boxes: list[np.ndarray] = []
        self._masks: list[Tensor] = []
        for row, record in zip(self._pixels, records, strict=True):
            pixels, (scale,) = letterbox([open_image(record.path)], size_px)
            row.copy_((pixels[0] * 255).round())
            annotated = [a for a in record.annotations if a.rle]
            self._boxes.append(np.array([a.box_xyxy for a in annotated], np.float32) * scale)
            masks = torch.zeros(len(annotated), size_px, size_px, dtype=torch.uint8)
            for mask, annotation in zip(masks, annotated, strict=True):
                shown = Image.fromarray(decode(annotation.rle).astype(np.uint8) * 255)
                shown = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))))
                mask[: shown.height, : shown.width] = torch.from_numpy(np.asarray(shown) > 127)
            self._masks.append(masks)

    def batch(self, rows: Sequence[int], generator: np.random.Generator) -> tuple[Tensor, list[Tensor], Tensor]:
        """Pixels (B, 3, S, S), boxes of each picture, masks (R, S, S); the last picture's boxes fill R up."""
        boxes = []
        for row in rows:
            box = self._boxes[row]
            sides = np.tile(box[:, 2:] - box[:, :2], 2)
            boxes.append(
                torch.from_numpy((box + _JITTER * sides * generator.normal(size=box.shape)).astype(np.float32))
            )
        masks = [self._masks[row] for row in rows]
        again = torch.arange(len(boxes[-1]) + -sum(map(len, boxes)) % sam.BOX_STEP) % len(boxes[-1])
        boxes[-1], masks[-1] = boxes[-1][again], masks[-1][again]
        return self._pixels[rows].float() / 255, boxes, torch.cat(masks).float()


def _fetch(name: str, revision: str | None, out: Path) -> Made:
    """Published weights as they are: transformers' `SamModel` reads them."""
    from lyrics.foundation import hub

    fetched = hub.fetch(name, revision)
    for file in sorted([*fetched.folder.glob("*.json"), *fetched.folder.glob("*.safetensors")]):
        shutil.copyfile(file, out / file.name)
    write_json(out / SETTINGS, {"source": "hub"})
    return Made(source="hub", name=name, revision=revision, licence=fetched.licence, parameters=count_parameters(out))
