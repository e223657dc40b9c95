"""What stage 1 learned, on held-out pictures: retrieval, matching, masked spatial prediction beside its baseline."""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lyrics.config import Config
from lyrics.model.inputs import TextTokenizer
from lyrics.train.losses import query_text_similarity
from lyrics.train.stage1_batches import Stage1Batch, Stage1Data

if TYPE_CHECKING:
    from lyrics.train.stage1 import Objectives

HELD_OUT = ("val", "test")  # the first that exists
MOST = 200
RANKS = (1, 5, 10)


@torch.no_grad()
def measure(objectives: "Objectives", config: Config, tokenizer: TextTokenizer) -> dict[str, float]:
    """Retrieval recall among at most 200 pictures, ITM accuracy on hard negatives, MSP accuracy."""
    from lyrics.train.stage1 import open_splits

    splits = open_splits(HELD_OUT)[:1]
    data = Stage1Data(
        splits,
        tokenizer,
        coordinate_format=config.refine.coordinate_format,
        mask_probability=config.stage1.mask_probability,
        seed=config.seed,
    )
    count = min(MOST, len(data))
    if count < 2:
        return {}
    batches = [data.batch(list(range(i, min(i + 50, count))), step=0) for i in range(0, count, 50)]
    found = _retrieval(objectives, batches)
    matched: list[Tensor] = []
    tokens: list[Tensor] = []
    other: list[Tensor] = []
    for batch in batches:
        if len(batch.ids) < 2:
            continue
        memory = objectives.look(batch)
        similarity_BB, _ = objectives.similarities(batch, memory)
        logits_B2, matched_B = objectives.matching_logits(batch, memory, similarity_BB)
        matched.append((logits_B2.argmax(-1) == matched_B.long()).float())
        tokens.append(_right(objectives, batch))
        other.append(_right(objectives, _of_other_pictures(batch)))
    found["itm_accuracy"] = float(torch.cat(matched).mean())
    if sum(map(len, tokens)):
        found["msp_accuracy"] = float(torch.cat(tokens).mean())
        found["msp_accuracy_other_image"] = float(torch.cat(other).mean())
    return found


def _retrieval(objectives: "Objectives", batches: list[Stage1Batch]) -> dict[str, float]:
    visual, text = [], []
    for batch in batches:
        query_BQD, _ = objectives.mq_former(
            "contrastive", objectives.look(batch), cross_query=objectives.itc_cross_query
        )
        visual.append(objectives.mq_former.split_queries(objectives.mq_former.image_projection(query_BQD))[0])
        text.append(objectives.encode_text(batch.caption_rows))
    similarity_BB = query_text_similarity(torch.cat(visual), torch.cat(text))
    found: dict[str, float] = {}
    for name, matrix in (("image_to_text", similarity_BB), ("text_to_image", similarity_BB.T)):
        rank_B = (matrix > matrix.diagonal()[:, None]).sum(-1)
        found |= {f"{name}_recall_at_{k}": float((rank_B < k).float().mean()) for k in RANKS}
    return found


def _right(objectives: "Objectives", batch: Stage1Batch) -> Tensor:
    logits_MV, labels_M = objectives.masked_spatial_logits(batch)
    return (logits_MV.argmax(-1) == labels_M).float()


def _of_other_pictures(batch: Stage1Batch) -> Stage1Batch:
    """The same texts beside the features of the next picture."""
    rows_B = torch.arange(len(batch.ids)).roll(-1)
    visual = dataclasses.replace(
        batch.visual, image_tokens_BPD=batch.visual.image_tokens_BPD[rows_B], local=batch.visual.local.index(rows_B)
    )
    return dataclasses.replace(batch, visual=visual)
