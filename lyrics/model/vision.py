"""The frozen image encoder (paper section 1): patches of a picture as tokens.

A CLIP tower gives its penultimate layer, class token first; an EfficientNet its last feature map, row by row, and the
finer maps before it, from which regions are described. Pictures are resized to a square, not cropped: a box in
fractions of the picture is the same box in the grid.

Shapes: B batch, P tokens, D width, C channels of a map, H × W pixels, h × w grid.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from lyrics.errors import InputError
from lyrics.model import pretrained
from lyrics.model.pictures import once

PREPROCESSING = "preprocessing.json"


class Preprocessing:
    """Square pixels, normalised per channel. Kept beside the weights, since they were trained with it."""

    def __init__(self, image_size_px: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.image_size_px, self.mean, self.std = image_size_px, tuple(mean), tuple(std)

    @classmethod
    def load(cls, folder: Path) -> "Preprocessing":
        path = Path(folder) / PREPROCESSING
        if not path.exists():
            raise InputError(f"{path} does not exist; make the image encoder with: python -m lyrics foundation clip")
        return cls(**json.loads(path.read_text()))

    def as_dict(self) -> dict[str, object]:
        return {"image_size_px": self.image_size_px, "mean": list(self.mean), "std": list(self.std)}

    def _square(self, images: Sequence[Image.Image]) -> Tensor:
        side = (self.image_size_px, self.image_size_px)
        coloured = (i if i.mode == "RGB" else i.convert("RGB") for i in images)
        arrays = [np.asarray(i if i.size == side else i.resize(side, Image.Resampling.BICUBIC)) for i in coloured]
        stacked = np.stack(arrays) if arrays else np.zeros((0, *side, 3), np.uint8)
        return torch.from_numpy(np.ascontiguousarray(stacked.transpose(0, 3, 1, 2)))

    def to_uint8(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, 3, H, W) bytes."""
        return once(images, ("square", self.image_size_px), self._square, ahead=True)

    def normalise(self, uint8_B3HW: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=uint8_B3HW.device).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (uint8_B3HW.float() / 255 - mean) / std

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        return self.normalise(self.to_uint8(images))


class ImageEncoder(nn.Module):
    """A frozen tower behind one face: it gives tokens (B, P, D), and maps (B, C, h, w) that are finer than their grid.

    Attributes:
        width: D.
        finer_channels: C of each finer map.
        grid: (h, w) of the patches.
        prefix_tokens: tokens before the patches (1 for CLIP's class token, 0 for a feature map).
        patches: P, prefix included.
        origin: the folder it was read from; what encoders of one origin see in a picture is the same.
    """

    def __init__(
        self,
        tower: nn.Module,
        preprocessing: Preprocessing,
        *,
        width: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        finer_channels: Sequence[int] = (),
        origin: str = "",
    ) -> None:
        super().__init__()
        self.origin, self.finer_channels = origin, tuple(finer_channels)
        self.tower = tower.eval().requires_grad_(False)
        self.preprocess = preprocessing
        self.width, self.grid, self.prefix_tokens = width, grid, prefix_tokens
        self.patches = grid[0] * grid[1] + prefix_tokens

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stays in evaluation mode: it is frozen, its batch statistics too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, P, D) and the finer maps."""
        return self.tower(pixels_B3HW)

    def look(self, images: Sequence[Image.Image], device: torch.device, batch_size: int | None = None) -> Tensor:
        """Tokens (B, P, D) of pictures; of a batch of `Pictures` once, whichever part of the refiner asks.

        Args:
            batch_size: a smaller batch is filled up to it and computed in this shape. Libraries choose their kernels
                by the shape, so that without it the last bits would depend on how many pictures come together.
        """
        return self._see(images, device, batch_size)[0]

    def region_maps(self, images: Sequence[Image.Image], device: torch.device) -> list[Tensor]:
        """The maps that regions of pictures are pooled from, float32: (B, C, h, w), the patches' own the last.

        Of several maps each cell is brought to mean 0 and length 1: put side by side they weigh the same, and the few
        channels of the finer ones, which tell colours, are not drowned by the classes of the last.
        """
        tokens_BPD, finer = self._see(images, device)
        patches_BDhw = self.feature_map(tokens_BPD).float()
        if not finer:
            return [patches_BDhw]
        centred = (m.float() - m.float().mean(dim=1, keepdim=True) for m in (*finer, patches_BDhw))
        return [F.normalize(map_BChw, dim=1) for map_BChw in centred]

    @property
    def region_width(self) -> int:
        """Channels of all `region_maps`."""
        return sum(self.finer_channels) + self.width

    def _see(
        self, images: Sequence[Image.Image], device: torch.device, batch_size: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        def make(pictures: Sequence[Image.Image]) -> tuple[Tensor, list[Tensor]]:
            count = len(pictures)
            pixels_B3HW = self.preprocess(pictures).to(device)
            missing = max(0, (batch_size or 0) - count)
            tokens_BPD, finer = self(F.pad(pixels_B3HW, (0, 0, 0, 0, 0, 0, 0, missing)))
            return tokens_BPD[:count], [map_BCHW[:count] for map_BCHW in finer]

        return once(images, seen_key(self.origin, device), make, ahead=False)

    def feature_map(self, tokens_BPD: Tensor) -> Tensor:
        """The patches as a map (B, D, h, w)."""
        patches = tokens_BPD[:, self.prefix_tokens :].transpose(1, 2)
        return patches.reshape(len(tokens_BPD), self.width, *self.grid)


class _Penultimate(nn.Module):
    """CLIP's tower without its last layer, which nothing reads."""

    def __init__(self, vision_model: Any) -> None:
        super().__init__()
        vision_model.encoder.layers = vision_model.encoder.layers[:-1]
        vision_model.post_layernorm = nn.Identity()
        self.vision_model = vision_model

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.vision_model(pixel_values=pixels_B3HW).last_hidden_state, []


class _FlatMap(nn.Module):
    """The last feature map of a timm network, flattened, and the maps of its stages in `FINER`."""

    FINER = (1, 2, 3)  # a fourth, an eighth and a sixteenth of the picture's side

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        last_BDhw, finer = self.network.forward_intermediates(pixels_B3HW, indices=self.FINER)
        return last_BDhw.flatten(2).transpose(1, 2), finer


def finer_channels(network: Any) -> list[int]:
    """Channels of the maps that regions of a timm network's pictures are described by, beside its last."""
    return [network.feature_info[stage]["num_chs"] for stage in _FlatMap.FINER]


def seen_key(origin: str, device: torch.device) -> tuple[str, str, str]:
    """Under which a batch of `Pictures` keeps what an encoder saw: its tokens and finer maps."""
    return ("seen", origin, str(device))


def load_image_encoder(folder: Path) -> ImageEncoder:
    """The encoder in a `clip` part of the foundation, frozen, in float32."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no image encoder; make it with: python -m lyrics foundation clip")
    config = json.loads((folder / "config.json").read_text())
    preprocessing = Preprocessing.load(folder)
    if "timm" in config:
        network: Any = timm_network(config["timm"])
        from safetensors.torch import load_file

        network.load_state_dict(load_file(folder / "model.safetensors"))
        side = preprocessing.image_size_px // network.feature_info[-1]["reduction"]
        return ImageEncoder(
            _FlatMap(network),
            preprocessing,
            width=network.num_features,
            grid=(side, side),
            prefix_tokens=0,
            finer_channels=finer_channels(network),
            origin=str(folder.resolve()),
        )
    from transformers import CLIPVisionModel

    vision = pretrained.read(CLIPVisionModel, folder, dtype=torch.float32)
    side = vision.config.image_size // vision.config.patch_size
    return ImageEncoder(
        _Penultimate(vision),
        preprocessing,
        width=vision.config.hidden_size,
        grid=(side, side),
        prefix_tokens=1,
        origin=str(folder.resolve()),
    )


def timm_network(name: str) -> nn.Module:
    """A network without weights; they come from the part's own file, never from the network."""
    import timm

    return timm.create_model(name, pretrained=False)
