"""What stage 1 learned, on held-out pictures: retrieval, matching, masked spatial prediction beside its baseline."""

import dataclasses

import torch
from torch import Tensor

from lyrics.config import Config
from lyrics.model.inputs import TextTokenizer
from lyrics.train.losses import IGNORED, query_text_similarity
from lyrics.train.objectives import Objectives
from lyrics.train.stage1_batches import Stage1Batch

HELD_OUT = ("val", "test")  # the first that exists
MOST = 200
RANKS = (1, 5, 10)


@torch.no_grad()
def measure(objectives: Objectives, config: Config, tokenizer: TextTokenizer) -> dict[str, float]:
    """Retrieval recall among at most 200 pictures, ITM accuracy on hard negatives, MSP accuracy."""
    from lyrics.train.stage1 import REFINED, open_splits, stage1_data

    device = objectives.mq_former.temperature.device
    held_out = tuple(name for name in HELD_OUT if (REFINED / name).is_dir())[:1]
    data = stage1_data(config, tokenizer, open_splits(held_out, config, device))
    count = min(MOST, len(data))
    if count < 2:
        return {}
    batches = [data.batch(list(range(i, min(i + 50, count))), step=0) for i in range(0, count, 50)]
    visual, text, matched = [], [], []
    captions: list[tuple[int, ...]] = []
    predicted: dict[str, list[Tensor]] = {}
    for batch in batches:
        looked = objectives.look(batch)
        query_BQC, caption_BC, _ = objectives.contrastive_features(batch, looked)
        visual.append(objectives.mq_former.split_queries(query_BQC)[0])
        text.append(caption_BC)
        captions += map(tuple, batch.caption_rows)
        versions = {"": batch}
        if len(batch.ids) > 1:
            versions["_other_image"] = _of_other_pictures(batch)
            similarity_BB = query_text_similarity(visual[-1], caption_BC)
            logits_P2, matched_P = objectives.matching_logits(batch, looked, similarity_BB, similarity_BB.T)
            matched.append((logits_P2.argmax(-1) == matched_P.long()).float())
        for suffix, seen in versions.items():
            for part, right_M in _masked_spatial(objectives, seen).items():
                predicted.setdefault(f"msp_{part}accuracy{suffix}", []).append(right_M)
    same_BB = torch.tensor([[one == other for other in captions] for one in captions], device=device)
    found = _retrieval(query_text_similarity(torch.cat(visual), torch.cat(text)), same_BB)
    found["itm_accuracy"] = float(torch.cat(matched).mean())
    return found | {name: float(torch.cat(right).mean()) for name, right in predicted.items() if sum(map(len, right))}


def _retrieval(similarity_BB: Tensor, same_BB: Tensor) -> dict[str, float]:
    """Recall both ways. Of equal similarities the wrong one comes first; the same caption elsewhere is not wrong."""
    found: dict[str, float] = {}
    for name, matrix_BB in (("image_to_text", similarity_BB), ("text_to_image", similarity_BB.T)):
        rank_B = ((matrix_BB >= matrix_BB.diagonal()[:, None]) & ~same_BB).sum(-1)
        found |= {f"{name}_recall_at_{k}": float((rank_B < k).float().mean()) for k in RANKS}
    return found


def _masked_spatial(objectives: Objectives, batch: Stage1Batch) -> dict[str, Tensor]:
    """Which hidden tokens are predicted right (1 or 0): of all, of tags, of boxes."""
    logits_MV, labels_M = objectives.masked_spatial_logits(batch, objectives.look(batch))
    right_M = (logits_MV.argmax(-1) == labels_M).float()
    kept = objectives.mq_former.config.max_text_tokens - 2
    in_tag_M = torch.tensor(
        [
            inside
            for labels, in_tag in zip(batch.msp_labels, batch.msp_in_tag, strict=True)
            for label, inside in zip(labels[:kept], in_tag, strict=False)
            if label != IGNORED
        ],
        dtype=torch.bool,
        device=right_M.device,
    )
    return {"": right_M, "tag_": right_M[in_tag_M], "box_": right_M[~in_tag_M]}


def _of_other_pictures(batch: Stage1Batch) -> Stage1Batch:
    """The same texts beside the features of the next picture."""
    rows_B = torch.arange(len(batch.ids)).roll(-1)
    visual = dataclasses.replace(
        batch.visual, image_tokens_BPD=batch.visual.image_tokens_BPD[rows_B], local=batch.visual.local.index(rows_B)
    )
    return dataclasses.replace(batch, visual=visual)
