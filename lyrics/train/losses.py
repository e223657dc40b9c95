"""The objectives of stage 1 as functions of named tensors (paper section 3).

Each is a sum over this rank's b of B joint pairs; the caller divides by the joint count (paper section 3 gives means).

Shapes: B pictures and B texts (b of them on this rank), P pairs of a picture and a text, M tokens asked for, Q queries,
C contrastive width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that carries no loss


def query_text_similarity(query_BQC: Tensor, text_BC: Tensor) -> Tensor:
    """Similarity (pictures, texts) of picture i and text j: the maximum over queries. Inputs are L2-normalised here."""
    query_BQC, text_BC = F.normalize(query_BQC, dim=-1), F.normalize(text_BC, dim=-1)
    return torch.einsum("iqc,jc->ijq", query_BQC, text_BC).amax(-1)


def smoothed_cross_entropy(logits_bB: Tensor, excluded_bB: Tensor, label_smoothing: float, first: int) -> Tensor:
    """Sum over rows of the cross-entropy against column `first` + row; excluded pairs are neither right nor wrong."""
    log_p_bB = logits_bB.masked_fill(excluded_bB, -math.inf).log_softmax(dim=-1)
    smooth_b = log_p_bB.masked_fill(excluded_bB, 0.0).sum(-1) / (~excluded_bB).sum(-1)
    return -((1 - label_smoothing) * log_p_bB.diagonal(first) + label_smoothing * smooth_b).sum()


def contrastive_loss(
    image_to_text_bB: Tensor,
    text_to_image_bB: Tensor,
    temperature: Tensor,
    same_bB: Tensor,
    label_smoothing: float,
    first: int = 0,
) -> Tensor:
    """Sum over b pairs of InfoNCE, mean of both ways, among B pairs of which these are `first`, `first` + 1 …

    Args:
        image_to_text_bB: similarity of each of the b pictures with all texts; `text_to_image_bB` the other way.
        same_bB: pairs that share a picture or a text; but for a pair itself they are left out.
    """
    itself_bB = torch.zeros_like(same_bB)
    itself_bB.diagonal(first).fill_(True)
    excluded_bB = same_bB & ~itself_bB
    both = [
        smoothed_cross_entropy(similarity_bB.float() / temperature, excluded_bB, label_smoothing, first)
        for similarity_bB in (image_to_text_bB, text_to_image_bB)
    ]
    return (both[0] + both[1]) / 2


def contrastive_floor(batch: int, label_smoothing: float) -> float:
    """The least value that label smoothing leaves: the entropy of the smoothed target."""
    if label_smoothing == 0 or batch == 1:
        return 0.0
    low = label_smoothing / batch
    high = 1 - label_smoothing + low
    return -(high * math.log(high) + (batch - 1) * low * math.log(low))


def hard_negatives(similarity_bB: Tensor, temperature: Tensor, same_bB: Tensor, uniform_b: Tensor) -> Tensor:
    """For each row a column drawn in proportion to exp(similarity / temperature), never a pair of `same_bB`.

    Args:
        uniform_b: one uniform draw in [0, 1) per row.

    Returns:
        index_b; -1 where a row has no negative at all.
    """
    logits_bB = (similarity_bB.float() / temperature).masked_fill(same_bB, -math.inf)
    possible_b = (~same_bB).any(-1)
    weights_bB = logits_bB.masked_fill(~possible_b[:, None], 0.0).softmax(-1).double().masked_fill(same_bB, 0.0)
    cumulative_bB = weights_bB.cumsum(-1)
    drawn_b = torch.searchsorted(cumulative_bB, (uniform_b * cumulative_bB[:, -1])[:, None], right=True).squeeze(-1)
    last_b = weights_bB.shape[1] - 1 - (weights_bB > 0).flip(-1).int().argmax(-1)
    return torch.where(possible_b, torch.minimum(drawn_b, last_b), -1)


def matching_loss(logits_P2: Tensor, matched_P: Tensor) -> Tensor:
    """Sum over pairs."""
    return F.cross_entropy(logits_P2.float(), matched_P.long(), reduction="sum")


def token_loss(logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Sum over the M tokens that are asked for; 0 where there are none."""
    return F.cross_entropy(logits_MV.float(), labels_M, reduction="sum")


MATCHING_CHANCE = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))  # one positive to two negatives
