"""Fits the region head on the maps of a trained YOLO."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lyrics import seeding
from lyrics.data.records import ImageRecord
from lyrics.data.webdataset import open_image
from lyrics.foundation import training
from lyrics.foundation.regions import CELLS, MapReader, RegionHead, batches, letterbox, pool
from lyrics.stage import Tracker

_HIDDEN = 128
_PICTURES = 64
_EPOCHS, _BATCH, _LR = 12, 128, 2e-3
_JITTER = 0.08  # of a side: predicted boxes are never exact
_JITTERED = 2


@torch.inference_mode()
def _pooled(
    read: MapReader, records: Sequence[ImageRecord], size_px: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, list[str]]]:
    """Pooled maps of true boxes, as they are and shifted a little, with their tags; a batch of pictures at a time."""
    generator = seeding.rng(seed, "foundation", "detector", "jitter")
    for rows in batches(len(records), _PICTURES):
        some = records[rows]
        pixels, scales = letterbox([open_image(record.path) for record in some], size_px)
        _, maps = read(pixels.to(device))
        boxes = [torch.tensor([a.box_xyxy for a in r.annotations]) * s for r, s in zip(some, scales, strict=True)]
        tags = [a.category for record in some for a in record.annotations]
        for copy in range(1 + _JITTERED):
            moved = boxes
            if copy:
                moved = []
                for one in boxes:
                    sides = (one[:, 2:] - one[:, :2]).repeat(1, 2)
                    moved.append(one + _JITTER * sides * torch.from_numpy(generator.normal(size=one.shape)).float())
            yield pool(maps[1:], [one.to(device) for one in moved], size_px, CELLS).half().cpu(), tags


def fit(
    read: MapReader,
    records: Sequence[ImageRecord],
    size_px: int,
    vocabulary: Sequence[str],
    vocabulary_TE: Tensor,
    seed: int,
    tracker: Tracker,
) -> RegionHead:
    """Cross-entropy of each true box over the embeddings of all tags; the maps stay as they are."""
    device = vocabulary_TE.device
    index = {tag: i for i, tag in enumerate(vocabulary)}
    pooled, labels = [], []
    for some, tags in _pooled(read, records, size_px, seed, device):
        pooled.append(some)
        labels += [index[tag] for tag in tags]
    pooled_RCSS, labels_R = torch.cat(pooled), torch.tensor(labels)
    with training.deterministic(seed, "detector"):
        head = RegionHead(pooled_RCSS.shape[1], _HIDDEN, vocabulary_TE.shape[1]).to(device)
        order = torch.cat([torch.randperm(len(labels_R)) for _ in range(_EPOCHS // (1 + _JITTERED))])
        chunks = order.split(_BATCH)

        def losses_at(step: int) -> dict[str, Tensor]:
            rows = chunks[step]
            _, regions_RE = head(pooled_RCSS[rows].to(device, torch.float32))
            return {"tag_loss": F.cross_entropy(head.similarity(regions_RE, vocabulary_TE), labels_R[rows].to(device))}

        training.train(
            head,
            part="detector",
            steps=len(chunks),
            lr=_LR,
            losses_at=losses_at,
            device=device,
            tracker=tracker,
        )
    return head
