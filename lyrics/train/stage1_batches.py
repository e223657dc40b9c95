"""Batches of stage 1: pictures with caption and spatial representation, every draw keyed by (seed, step, sample)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lyrics.model.inputs import TextTokenizer, VisualBatch
from lyrics.refiner.features import RefinedImage, RefinedSplit
from lyrics.refiner.spatial_text import CoordinateFormat, object_pieces
from lyrics.seeding import rng
from lyrics.train.losses import IGNORED

MAX_CAPTION_TOKENS = 32  # as BLIP-2


@dataclasses.dataclass(frozen=True)
class SpatialIds:
    """Token ids of a spatial representation, and for each object where its tag and its box lie in them."""

    ids: list[int]
    tag_spans: list[tuple[int, int]]
    box_spans: list[tuple[int, int]]


def spatial_ids(image: RefinedImage, tokenizer: TextTokenizer, coordinate_format: CoordinateFormat) -> SpatialIds:
    """Tokenise object by object, so that each piece's place is known."""
    size = np.array([image.width, image.height, image.width, image.height])
    boxes = [np.clip(np.array(box) / size, 0, 1) for box in image.boxes_xyxy]
    ids: list[int] = []
    tags, places = [], []
    colon = tokenizer.ids(":") if coordinate_format == "decimal3" else []
    for tag, box in object_pieces(image.tags, boxes, coordinate_format):
        start = len(ids)
        ids += tokenizer.ids(tag)
        tags.append((start, len(ids)))
        ids += colon
        start = len(ids)
        ids += tokenizer.ids(box)
        places.append((start, len(ids)))
        ids += tokenizer.ids(";")
    return SpatialIds(ids, tags, places)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage1Batch:
    """B pairs. `*_rows` are token ids without special tokens; `same_*_BB` marks pairs that share picture or text."""

    ids: tuple[str, ...]
    visual: VisualBatch
    caption_rows: list[list[int]]
    spatial_rows: list[list[int]]
    same_caption_BB: Tensor
    same_spatial_BB: Tensor
    msp_rows: list[list[int]]
    msp_labels: list[list[int]]
    hidden_tag_BN: Tensor
    hidden_box_BN: Tensor
    uniform_B2: Tensor


class Stage1Data:
    """All pairs of some refined splits, tokenised as they are met."""

    def __init__(
        self,
        splits: Sequence[RefinedSplit],
        tokenizer: TextTokenizer,
        *,
        coordinate_format: CoordinateFormat,
        mask_probability: float,
        seed: int,
    ) -> None:
        self.tokenizer, self.coordinate_format = tokenizer, coordinate_format
        self.mask_probability, self.seed = mask_probability, seed
        self.pairs = [(s, i) for s in splits for i, image in s.images.items() if image.captions]
        self._spatial: dict[int, SpatialIds] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int] | np.ndarray, step: int) -> Stage1Batch:
        """The pairs `indices` as the training step `step` sees them."""
        chosen = [self.pairs[i] for i in indices]
        images = [split.images[image_id] for split, image_id in chosen]
        draws = [rng(self.seed, "stage1", step, image.image_id) for image in images]
        captions = [i.captions[int(d.integers(len(i.captions)))] for i, d in zip(images, draws, strict=True)]
        spatial = [self._spatial_ids(int(index), image) for index, image in zip(indices, images, strict=True)]
        visual = self.tokenizer.visual_batch([split.seen(image_id) for split, image_id in chosen])
        hidden_tag = np.zeros(visual.local.object_mask_BN.shape, dtype=bool)
        hidden_box = np.zeros_like(hidden_tag)
        masked = [
            self._mask(s, d, hidden_tag[row], hidden_box[row])
            for row, (s, d) in enumerate(zip(spatial, draws, strict=True))
        ]
        same_image = _equal([i.image_id for i in images])
        return Stage1Batch(
            ids=tuple(i.image_id for i in images),
            visual=visual,
            caption_rows=[self.tokenizer.ids(c)[:MAX_CAPTION_TOKENS] for c in captions],
            spatial_rows=[s.ids for s in spatial],
            same_caption_BB=same_image | _equal(captions),
            same_spatial_BB=same_image | _equal([i.spatial_text for i in images]),
            msp_rows=[ids for ids, _ in masked],
            msp_labels=[labels for _, labels in masked],
            hidden_tag_BN=torch.from_numpy(hidden_tag),
            hidden_box_BN=torch.from_numpy(hidden_box),
            uniform_B2=torch.from_numpy(np.stack([d.random(2) for d in draws])),
        )

    def _spatial_ids(self, index: int, image: RefinedImage) -> SpatialIds:
        if index not in self._spatial:
            self._spatial[index] = spatial_ids(image, self.tokenizer, self.coordinate_format)
        return self._spatial[index]

    def _mask(
        self, spatial: SpatialIds, draw: np.random.Generator, hidden_tag_N: np.ndarray, hidden_box_N: np.ndarray
    ) -> tuple[list[int], list[int]]:
        """Hide whole tags and boxes, at least one of them; returns ids with [MASK] and labels (IGNORED elsewhere)."""
        count = len(spatial.tag_spans)
        ids, labels = list(spatial.ids), [IGNORED] * len(spatial.ids)
        if not count:
            return ids, labels
        hidden = draw.random((count, 2)) < self.mask_probability
        if not hidden.any():
            hidden[draw.integers(count), draw.integers(2)] = True
        for n in range(count):
            for hide, (start, end) in zip(hidden[n], (spatial.tag_spans[n], spatial.box_spans[n]), strict=True):
                if hide:
                    labels[start:end] = ids[start:end]
                    ids[start:end] = [self.tokenizer.mask] * (end - start)
        hidden_tag_N[:count], hidden_box_N[:count] = hidden.T
        return ids, labels


def _equal(values: Sequence[str]) -> Tensor:
    _, codes = np.unique(np.array(values, dtype=object).astype(str), return_inverse=True)
    return torch.from_numpy(codes[:, None] == codes[None, :])
