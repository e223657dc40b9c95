"""What a detector knows about a box: its feature maps pooled inside it, and the tag that they resemble.

Shapes: B images, R boxes of a batch, C channels, S cells along a side of a pooled region, T tags, E width of the text
space. Boxes are xyxy in pixels of the picture as the network sees it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import ops

from lyrics.model.pictures import once

CELLS = 7
_GREY = 114  # ultralytics' padding
_SAMPLES = 2  # points along a side of each cell


def letterbox(images: Sequence[Image.Image], size_px: int) -> tuple[Tensor, list[float]]:
    """Pictures as a batch (B, 3, size, size) in [0, 1], at the top left of a grey square, and the scale of each."""
    pixels, scales = once(images, ("letterbox", size_px), functools.partial(_letterbox, size_px=size_px), ahead=True)
    return pixels.permute(0, 3, 1, 2).float().div_(255), scales


def _letterbox(images: Sequence[Image.Image], size_px: int) -> tuple[Tensor, list[float]]:
    """Bytes (B, size, size, 3)."""
    pixels, scales = np.full((len(images), size_px, size_px, 3), _GREY, np.uint8), []
    for row, image in zip(pixels, images, strict=True):
        scale = size_px / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        resized = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
        if resized.size != (width, height):
            resized = resized.resize((width, height), Image.Resampling.BILINEAR)
        row[:height, :width] = np.asarray(resized)
        scales.append(scale)
    return torch.from_numpy(pixels), scales


def pool(maps: Sequence[Tensor], boxes: Sequence[Tensor], size_px: int, cells: int) -> Tensor:
    """RoIAlign of every map inside every box, side by side: (R, channels of all maps, cells, cells)."""
    regions = [box.to(maps[0]) for box in boxes]
    pooled = [
        ops.roi_align(m, regions, cells, m.shape[-1] / size_px, sampling_ratio=_SAMPLES, aligned=True) for m in maps
    ]
    return torch.cat(pooled, dim=1)


class MapReader:
    """Runs a detector and keeps what the named layers put out."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.model, self._layers = model, tuple(layers)
        self._seen: dict[int, Tensor] = {}
        for layer in self._layers:
            model.model[layer].register_forward_hook(self._keep(layer))

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._seen[layer] = output

        return hook

    def __call__(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Decoded predictions (B, 4 + classes, anchors) and the maps."""
        output = self.model(pixels.contiguous(memory_format=torch.channels_last))
        maps = [self._seen.pop(layer) for layer in self._layers]
        return (output[0] if isinstance(output, tuple) else output), maps


class RegionHead(nn.Module):
    """Fast R-CNN's box head, from pooled maps into the text space of the CLIP: any tag can be compared with a box."""

    def __init__(self, channels: int, hidden: int, text_width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden // 2, 3, padding=1)
        self.norm = nn.GroupNorm(8, hidden // 2)
        self.hidden = nn.Linear(hidden // 2 * CELLS**2, hidden)
        self.project = nn.Linear(hidden, text_width)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # similarities start as if divided by a temperature of 0.1

    def forward(self, pooled_RCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden features (R, hidden) and unit vectors in the text space (R, E)."""
        reduced = F.gelu(self.norm(self.reduce(pooled_RCSS)))
        hidden = F.gelu(self.hidden(reduced.flatten(1)))
        return hidden, F.normalize(self.project(hidden), dim=-1)

    def similarity(self, regions_RE: Tensor, texts_TE: Tensor) -> Tensor:
        """Logits (R, T)."""
        return self.log_scale.exp().clamp(max=100) * regions_RE @ texts_TE.T


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
