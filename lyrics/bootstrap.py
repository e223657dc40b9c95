"""Bootstrap intervals of a mean over samples that come in groups: questions about one picture are not independent."""

from collections.abc import Sequence

import numpy as np


def interval(
    values: Sequence[float], groups: Sequence[str], draws: np.random.Generator, *, resamples: int, confidence: float
) -> tuple[float, float]:
    """Percentile interval of the mean of `values`, groups resampled with replacement.

    Args:
        groups: of each value, e.g. its picture.
        confidence: e.g. 0.95 for the interval between the percentiles 2.5 and 97.5.
    """
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(index, weights=np.asarray(values, np.float64)), np.bincount(index)
    shares = np.full(len(names), 1 / len(names))
    # In groups of equal weight a draw with replacement is a multinomial count. One after the other: all at once would
    # take as much memory as resamples times groups.
    drawn = (draws.multinomial(len(names), shares) for _ in range(resamples))
    means = [(counted @ sums) / (counted @ counts) for counted in drawn]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
