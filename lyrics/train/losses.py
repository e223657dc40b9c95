"""The objectives of stage 1 as functions of named tensors (paper section 3).

Shapes: B pictures, B texts, Q queries, T text tokens, C contrastive width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # label of a position that carries no loss


def query_text_similarity(query_BQC: Tensor, text_BC: Tensor) -> Tensor:
    """Similarity_BB of picture i and text j: the maximum over queries. Inputs are L2-normalised here."""
    query_BQC, text_BC = F.normalize(query_BQC, dim=-1), F.normalize(text_BC, dim=-1)
    return torch.einsum("iqc,jc->ijq", query_BQC, text_BC).amax(-1)


def smoothed_cross_entropy(logits_BB: Tensor, excluded_BB: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy against the diagonal; excluded pairs are neither positive nor negative."""
    log_p_BB = logits_BB.masked_fill(excluded_BB, -math.inf).log_softmax(dim=-1)
    smooth_B = log_p_BB.masked_fill(excluded_BB, 0.0).sum(-1) / (~excluded_BB).sum(-1)
    return -((1 - label_smoothing) * log_p_BB.diagonal() + label_smoothing * smooth_B).mean()


def contrastive_loss(similarity_BB: Tensor, temperature: Tensor, same_BB: Tensor, label_smoothing: float) -> Tensor:
    """InfoNCE both ways. `same_BB` marks pairs that share a picture or a text; off the diagonal they are left out."""
    excluded_BB = same_BB & ~torch.eye(len(same_BB), dtype=torch.bool, device=same_BB.device)
    logits_BB = similarity_BB.float() / temperature
    image_to_text = smoothed_cross_entropy(logits_BB, excluded_BB, label_smoothing)
    text_to_image = smoothed_cross_entropy(logits_BB.T, excluded_BB.T, label_smoothing)
    return (image_to_text + text_to_image) / 2


def contrastive_floor(batch: int, label_smoothing: float) -> float:
    """The least value that label smoothing leaves: the entropy of the smoothed target."""
    if label_smoothing == 0 or batch == 1:
        return 0.0
    low = label_smoothing / batch
    high = 1 - label_smoothing + low
    return -(high * math.log(high) + (batch - 1) * low * math.log(low))


def hard_negatives(similarity_BB: Tensor, temperature: Tensor, same_BB: Tensor, uniform_B: Tensor) -> Tensor:
    """For each row a column drawn in proportion to exp(similarity / temperature), never a pair of `same_BB`.

    Args:
        uniform_B: one uniform draw in [0, 1) per row.

    Returns:
        index_B; -1 where a row has no negative at all.
    """
    logits_BB = (similarity_BB.float() / temperature).masked_fill(same_BB, -math.inf)
    possible_B = (~same_BB).any(-1)
    weights_BB = logits_BB.masked_fill(~possible_B[:, None], 0.0).softmax(-1).double().masked_fill(same_BB, 0.0)
    cumulative_BB = weights_BB.cumsum(-1)
    drawn_B = torch.searchsorted(cumulative_BB, (uniform_B * cumulative_BB[:, -1])[:, None], right=True).squeeze(-1)
    last_B = weights_BB.shape[1] - 1 - (weights_BB > 0).flip(-1).int().argmax(-1)
    return torch.where(possible_B, torch.minimum(drawn_B, last_B), -1)


def matching_loss(logits_B2: Tensor, matched_B: Tensor) -> Tensor:
    return F.cross_entropy(logits_B2.float(), matched_B.long())


def token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross-entropy over the positions whose label is not IGNORED."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), ignore_index=IGNORED)


def causal_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """`token_loss` where position t predicts the label at t + 1."""
    return token_loss(logits_BTV[:, :-1], labels_BT[:, 1:])


MATCHING_CHANCE = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3))  # one positive to two negatives
