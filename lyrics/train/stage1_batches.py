"""Batches of stage 1: pictures with caption and spatial representation, every draw keyed by (seed, step, sample).

Shapes: B pairs in the joint batch, b of them on this rank, N objects.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lyrics.model.inputs import TEXTS_REMEMBERED, TextTokenizer, VisualBatch
from lyrics.refiner.features import RefinedImage, RefinedSplit, see
from lyrics.refiner.spatial_text import CoordinateFormat, object_pieces
from lyrics.seeding import rng
from lyrics.train.losses import IGNORED

MAX_CAPTION_TOKENS = 32  # without [CLS] and [SEP]; BLIP-2 counts them in


@dataclasses.dataclass(frozen=True)
class SpatialIds:
    """Token ids of a spatial representation, and for each object where its tag and its box lie in them."""

    ids: list[int]
    tag_spans: list[tuple[int, int]]
    box_spans: list[tuple[int, int]]

    @property
    def in_tag(self) -> list[bool]:
        """For each token whether it belongs to a tag."""
        inside = [False] * len(self.ids)
        for start, end in self.tag_spans:
            inside[start:end] = [True] * (end - start)
        return inside


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


@dataclasses.dataclass(frozen=True)
class Masked:
    """A spatial representation with [MASK] in places, labels (IGNORED elsewhere), and the tags and boxes hidden."""

    ids: list[int]
    labels: list[int]
    hidden_N2: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage1Batch:
    """Texts of B pairs, pictures and masked texts of the b among them that are this rank's.

    Attributes:
        own: the place of the b among the B.
        ids: of the b.
        caption_rows, spatial_rows: B lists of token ids without special tokens.
        same_caption_BB, same_spatial_BB: pairs that share a picture or the text.
        msp_rows, msp_labels, msp_in_tag: of the b: ids with [MASK], hidden ids (else IGNORED), tokens that are of tags.
        totals: by loss, over how many terms it is the mean.
    """

    own: slice
    ids: tuple[str, ...]
    visual: VisualBatch
    caption_rows: list[list[int]]
    spatial_rows: list[list[int]]
    same_caption_BB: Tensor
    same_spatial_BB: Tensor
    msp_rows: list[list[int]]
    msp_labels: list[list[int]]
    msp_in_tag: list[list[bool]]
    hidden_tag_bN: Tensor
    hidden_box_bN: Tensor
    uniform_B2: Tensor
    totals: dict[str, int]


class Stage1Data:
    """All pairs of some refined splits, tokenised as they are met."""

    def __init__(
        self,
        splits: Sequence[RefinedSplit],
        tokenizer: TextTokenizer,
        *,
        coordinate_format: CoordinateFormat,
        mask_probability: float,
        max_text_tokens: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.coordinate_format = tokenizer, coordinate_format
        self.mask_probability, self.max_text_tokens, self.seed = mask_probability, max_text_tokens, seed
        self.pairs = [(s, i) for s in splits for i, image in s.images.items() if image.captions]
        self._spatial_ids = functools.lru_cache(TEXTS_REMEMBERED)(self._spatial_ids_of)

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: Sequence[int] | np.ndarray, step: int, own: slice | None = None) -> Stage1Batch:
        """The pairs `indices` as the training step `step` sees them; pictures only of those in `own` (None: all)."""
        own = slice(0, len(indices)) if own is None else own
        chosen = [self.pairs[i] for i in indices]
        images = [split.images[image_id] for split, image_id in chosen]
        draws = [rng(self.seed, "stage1", step, image.image_id) for image in images]
        captions = [i.captions[int(d.integers(len(i.captions)))] for i, d in zip(images, draws, strict=True)]
        spatial = [self._spatial_ids(int(index)) for index in indices]
        caption_rows = [self.tokenizer.ids(c)[:MAX_CAPTION_TOKENS] for c in captions]
        masked = [self._mask(s, d) for s, d in zip(spatial, draws, strict=True)]
        same_image_BB = _equal([i.image_id for i in images])
        same_caption_BB = same_image_BB | _equal(captions)
        visual = self.tokenizer.visual_batch(see(chosen[own]))
        hidden_bN2 = np.zeros((*visual.local.object_mask_BN.shape, 2), dtype=bool)
        for row, one in enumerate(masked[own]):
            hidden_bN2[row, : len(one.hidden_N2)] = one.hidden_N2
        return Stage1Batch(
            own=own,
            ids=tuple(i.image_id for i in images[own]),
            visual=visual,
            caption_rows=caption_rows,
            spatial_rows=[s.ids for s in spatial],
            same_caption_BB=same_caption_BB,
            same_spatial_BB=same_image_BB | _equal([i.spatial_text for i in images]),
            msp_rows=[m.ids for m in masked[own]],
            msp_labels=[m.labels for m in masked[own]],
            msp_in_tag=[s.in_tag for s in spatial[own]],
            hidden_tag_bN=torch.from_numpy(hidden_bN2[..., 0].copy()),
            hidden_box_bN=torch.from_numpy(hidden_bN2[..., 1].copy()),
            uniform_B2=torch.from_numpy(np.stack([d.random(2) for d in draws])),
            totals={
                "itc_loss": len(images),
                "itc_spatial_loss": len(images),
                # A pair, and one negative each way where there is one.
                "itm_loss": len(images) + 2 * int((~same_caption_BB).any(1).sum()),
                "icg_loss": sum(len(row) + 1 for row in caption_rows),
                "msp_loss": sum(self._asked(m.labels) for m in masked),
            },
        )

    def _spatial_ids_of(self, index: int) -> SpatialIds:
        split, image_id = self.pairs[index]
        return spatial_ids(split.images[image_id], self.tokenizer, self.coordinate_format)

    def _mask(self, spatial: SpatialIds, draw: np.random.Generator) -> Masked:
        """Hide whole tags and boxes, at least one of them where there are objects."""
        count = len(spatial.tag_spans)
        ids, labels = list(spatial.ids), [IGNORED] * len(spatial.ids)
        hidden_N2 = draw.random((count, 2)) < self.mask_probability
        if count and not hidden_N2.any():
            hidden_N2[draw.integers(count), draw.integers(2)] = True
        for n in range(count):
            for hide, (start, end) in zip(hidden_N2[n], (spatial.tag_spans[n], spatial.box_spans[n]), strict=True):
                if hide:
                    labels[start:end] = ids[start:end]
                    ids[start:end] = [self.tokenizer.mask] * (end - start)
        return Masked(ids, labels, hidden_N2)

    def _asked(self, labels: list[int]) -> int:
        return sum(label != IGNORED for label in labels[: self.max_text_tokens - 2])


def _equal(values: Sequence[str]) -> Tensor:
    _, codes = np.unique(np.array(values, dtype=object).astype(str), return_inverse=True)
    return torch.from_numpy(codes[:, None] == codes[None, :])
