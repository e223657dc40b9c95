"""Masks as compressed COCO run lengths: a picture of twelve megapixels has masks of kilobytes, not of megabytes.

Shapes: N masks, h × w logits that cover the picture, H × W pixels of the picture.
"""

import numpy as np
from pycocotools import mask as coco_mask
from torch import Tensor


def encode(masks_NHW: np.ndarray) -> tuple[str, ...]:
    """Counts, one string a mask."""
    columns = masks_NHW.transpose(0, 2, 1).astype(np.uint8, order="C")  # as COCO counts: column by column
    return tuple(rle["counts"].decode() for rle in coco_mask.encode(columns.transpose(2, 1, 0)))


def decode(counts: str, height: int, width: int) -> np.ndarray:
    """(H, W) bool; nothing is inside where `counts` is empty, as without a segmenter."""
    if not counts:
        return np.zeros((height, width), bool)
    return coco_mask.decode({"size": [height, width], "counts": counts}).astype(bool)


def from_logits(logits_Nhw: Tensor, height: int, width: int) -> tuple[str, ...]:
    """Counts of logits above 0 at the picture's size, bilinear as `interpolate` (corners not aligned).

    Between four values that are not above 0 none is, so only the part of the picture around those that are is computed:
    a small object costs the same in a large picture.
    """
    counts = []
    for logits_hw in logits_Nhw.float().cpu().numpy():
        above_hw = logits_hw > 0
        rows, columns = np.flatnonzero(above_hw.any(1)), np.flatnonzero(above_hw.any(0))
        if not len(rows):
            counts.append(_compress(np.zeros(0, np.int64), height, width))
            continue
        y0, y1 = _reach(rows[0], rows[-1], above_hw.shape[0], height)
        x0, x1 = _reach(columns[0], columns[-1], above_hw.shape[1], width)
        part_yw = _resample(logits_hw, height, y0, y1)
        inside_xy = _resample(part_yw.T, width, x0, x1) > 0
        counts.append(_compress(_edges(inside_xy, x0, y0, height), height, width))
    return tuple(counts)


def _reach(first: int, last: int, cells: int, pixels: int) -> tuple[int, int]:
    """The pixels, from and up to, that lie between or beside the cells `first` … `last`."""
    scale = pixels / cells
    return max(0, int((first - 0.5) * scale) - 1), min(pixels, int((last + 1.5) * scale) + 2)


def _resample(values_cX: np.ndarray, pixels: int, start: int, stop: int) -> np.ndarray:
    """Rows `start` … `stop` - 1 of those that would be `pixels` rows, each between two rows of the values."""
    cells = len(values_cX)
    if cells == pixels:
        return values_cX[start:stop]
    at_P = np.clip((np.arange(start, stop) + 0.5) * (cells / pixels) - 0.5, 0, cells - 1).astype(np.float32)
    before_P = at_P.astype(np.int64)
    before_PX, after_PX = values_cX[before_P], values_cX[np.minimum(before_P + 1, cells - 1)]
    return before_PX + (at_P - before_P).astype(np.float32)[:, None] * (after_PX - before_PX)


def _edges(inside_xy: np.ndarray, x0: int, y0: int, height: int) -> np.ndarray:
    """Where runs begin and end, in turns, in the picture counted column by column; the part lies at x0, y0."""
    padded = np.zeros((inside_xy.shape[0], inside_xy.shape[1] + 2), np.int8)
    padded[:, 1:-1] = inside_xy
    x, y = np.nonzero(np.diff(padded, axis=1))
    edges = (x + x0) * height + y + y0
    # A run that ends at the bottom goes on at the top of the next column.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2])
    return np.delete(edges, np.concatenate([2 * joined + 1, 2 * joined + 2]))


def _compress(edges: np.ndarray, height: int, width: int) -> str:
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    if len(counts) > 1 and not counts[-1]:
        counts.pop()
    return coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"].decode()
