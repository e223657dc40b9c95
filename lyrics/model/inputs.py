"""What the frozen parts saw in one picture: the input of MQ-Former."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lyrics.model.local_tokens import LocalFeatures


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeenImage:
    """One picture after the image encoder and the visual refiner. N objects, ordered by score; N may be 0.

    Attributes:
        image_tokens_PD: image-encoder tokens, float16 or float32, (patches, encoder width).
        detector_tokens_ND: detector features pooled inside each box, (objects, detector width).
        segmenter_tokens_ND: segmenter features averaged under each mask, (objects, segmenter width).
        tags: N names.
        boxes_xyxy_N4: corners as fractions of width and height, in [0, 1].
        spatial_text: tags and boxes as text (`refiner.spatial_text.format_objects`).
        told: which objects it tells of, by number; None for all.
    """

    image_tokens_PD: np.ndarray
    detector_tokens_ND: np.ndarray
    segmenter_tokens_ND: np.ndarray
    tags: tuple[str, ...]
    boxes_xyxy_N4: np.ndarray
    spatial_text: str
    told: tuple[int, ...] | None = None

    def is_finite(self) -> bool:
        """Whether every number in it is."""
        return all(np.isfinite(array).all() for array in vars(self).values() if isinstance(array, np.ndarray))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualBatch:
    """Pictures as tensors: image_tokens_BPD and the refiner's local features."""

    image_tokens_BPD: torch.Tensor
    local: LocalFeatures

    def to(self, device: torch.device) -> "VisualBatch":
        return VisualBatch(image_tokens_BPD=self.image_tokens_BPD.to(device), local=self.local.to(device))


TEXTS_REMEMBERED = 1 << 16  # those of an epoch of `tiny`
_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


class TextTokenizer:
    """Token ids of MQ-Former's texts. Those seen last are remembered: captions, tags and spatial texts come again."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.pad, self.cls, self.sep, self.mask, self.dec = map(self._special, _SPECIAL)
        self._ids = functools.lru_cache(TEXTS_REMEMBERED)(self._tokenized)

    def _special(self, token: str) -> int:
        number = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(number, int)
        return number

    def ids(self, text: str) -> list[int]:
        """Ids of `text` without special tokens."""
        return self._ids(text).tolist()

    def _tokenized(self, text: str) -> np.ndarray:
        """In an array: in a server texts do not come again, and integers take nine times as much."""
        return np.array(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    def pad_rows(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids_BT and mask_BT (True where real)."""
        ids_BT = np.full((len(rows), max(1, max(map(len, rows)))), self.pad, dtype=np.int64)
        mask_BT = np.zeros(ids_BT.shape, dtype=bool)
        for row, ids in enumerate(rows):
            ids_BT[row, : len(ids)] = ids
            mask_BT[row, : len(ids)] = True
        return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)

    def visual_batch(self, seen: Sequence[SeenImage]) -> VisualBatch:
        """Stack pictures, padding objects to the most in the batch."""
        batch, objects = len(seen), max(1, max(len(s.tags) for s in seen))
        tag_rows = [[self.ids(tag) for tag in s.tags] for s in seen]
        longest = max((len(ids) for rows in tag_rows for ids in rows), default=1)
        tag_ids = np.full((batch, objects, longest), self.pad, dtype=np.int64)
        boxes = np.zeros((batch, objects, 4), dtype=np.float32)
        mask = np.zeros((batch, objects), dtype=bool)
        detector = np.zeros((batch, objects, seen[0].detector_tokens_ND.shape[-1]), dtype=np.float32)
        segmenter = np.zeros((batch, objects, seen[0].segmenter_tokens_ND.shape[-1]), dtype=np.float32)
        for row, (image, ids_N) in enumerate(zip(seen, tag_rows, strict=True)):
            count = len(ids_N)
            mask[row, :count] = True
            boxes[row, :count] = image.boxes_xyxy_N4
            detector[row, :count] = image.detector_tokens_ND
            segmenter[row, :count] = image.segmenter_tokens_ND
            for n, ids in enumerate(ids_N):
                tag_ids[row, n, : len(ids)] = ids
        return VisualBatch(
            image_tokens_BPD=torch.from_numpy(np.stack([s.image_tokens_PD for s in seen])).float(),
            local=LocalFeatures(
                detector_BND=torch.from_numpy(detector),
                segmenter_BND=torch.from_numpy(segmenter),
                tag_ids_BNK=torch.from_numpy(tag_ids),
                boxes_BN4=torch.from_numpy(boxes),
                object_mask_BN=torch.from_numpy(mask),
            ),
        )
