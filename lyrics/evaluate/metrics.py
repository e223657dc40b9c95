"""Scores of referring expressions and of object hallucination (POPE)."""

import dataclasses
from collections.abc import Sequence

import numpy as np

Box = tuple[float, float, float, float]
IOU_THRESHOLD = 0.5


def iou(first_xyxy: Box, second_xyxy: Box) -> float:
    """Intersection over union of two boxes; 0 where either is empty."""
    return float(pairwise_iou(np.asarray([first_xyxy]), np.asarray([second_xyxy]))[0, 0])


def pairwise_iou(first_N4: np.ndarray, second_M4: np.ndarray) -> np.ndarray:
    """IoU of every box with every box, (N, M)."""
    low = np.maximum(first_N4[:, None, :2], second_M4[None, :, :2])
    high = np.minimum(first_N4[:, None, 2:], second_M4[None, :, 2:])
    intersection_NM = np.prod(np.clip(high - low, 0.0, None), axis=-1)
    area_N = np.prod(np.clip(first_N4[:, 2:] - first_N4[:, :2], 0.0, None), axis=-1)
    area_M = np.prod(np.clip(second_M4[:, 2:] - second_M4[:, :2], 0.0, None), axis=-1)
    union_NM = area_N[:, None] + area_M[None, :] - intersection_NM
    return np.divide(intersection_NM, union_NM, out=np.zeros_like(union_NM, dtype=float), where=union_NM > 0)


def refer_hit(predicted_xyxy: Box | None, target_xyxy: Box) -> float:
    """1.0 where IoU > 0.5, else 0.0; an answer that is no box (None) is wrong."""
    return float(predicted_xyxy is not None and iou(predicted_xyxy, target_xyxy) > IOU_THRESHOLD)


def yes_or_no(answer: str) -> str:
    """POPE's reading of a free answer: `no` where its first sentence holds No, no or not, else `yes`."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


@dataclasses.dataclass(frozen=True)
class PopeScores:
    """Of yes/no answers, `yes` being the positive class. Precision, recall and F1 are 0 where their denominator is."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def pope_scores(answers: Sequence[str], labels: Sequence[str]) -> PopeScores:
    """Official POPE scores of answers that are already `yes` or `no`."""
    pairs = list(zip(answers, labels, strict=True))
    true_positive = sum(answer == label == "yes" for answer, label in pairs)
    said_yes = sum(answer == "yes" for answer, _ in pairs)
    is_yes = sum(label == "yes" for _, label in pairs)
    precision = true_positive / said_yes if said_yes else 0.0
    recall = true_positive / is_yes if is_yes else 0.0
    return PopeScores(
        accuracy=sum(answer == label for answer, label in pairs) / len(pairs),
        precision=precision,
        recall=recall,
        f1=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        yes_ratio=said_yes / len(pairs),
    )
