"""Masks as compressed COCO run lengths: a picture of twelve megapixels has masks of kilobytes, not of megabytes.

Shapes: N masks, H × W pixels of the picture.
"""

import numpy as np
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch import Tensor

_PIXELS_AT_ONCE = 16_000_000


def encode(masks_NHW: np.ndarray) -> tuple[str, ...]:
    """Counts, one string a mask."""
    if not masks_NHW.size:
        return ("",) * len(masks_NHW)
    columns = np.asfortranarray(masks_NHW.transpose(1, 2, 0).astype(np.uint8, copy=False))
    return tuple(rle["counts"].decode() for rle in coco_mask.encode(columns))


def decode(counts: str, height: int, width: int) -> np.ndarray:
    """(H, W) bool; nothing is inside where `counts` is empty, as without a segmenter."""
    if not counts:
        return np.zeros((height, width), bool)
    return coco_mask.decode({"size": [height, width], "counts": counts}).astype(bool)


def from_logits(logits_Nhw: Tensor, height: int, width: int) -> tuple[str, ...]:
    """Counts of logits above 0, brought to the picture's size a few at a time: memory does not grow with N."""
    if logits_Nhw.shape[1:] == (height, width):
        return encode((logits_Nhw > 0).cpu().numpy())
    counts: list[str] = []
    for part in logits_Nhw.split(max(1, _PIXELS_AT_ONCE // (height * width))):
        whole = F.interpolate(part[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
        counts += encode((whole > 0).cpu().numpy())
    return tuple(counts)
