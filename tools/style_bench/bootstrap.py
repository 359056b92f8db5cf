"""How sure a number is: prompts are drawn again with replacement, and what was computed of them is computed again.

The pictures of one prompt are alike, so prompts are drawn and not pictures. All methods get the same prompts drawn,
so that ratios and differences between methods are paired.

Legend: P prompts, R replicates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 2000
LEVEL = 0.95
"""Share of the replicates that an interval holds."""


@dataclass(frozen=True)
class Estimate:
    """A number and its interval.

    Attributes:
        value: computed of the prompts as they are.
        low: lower end of the 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def choices(count: int, key: int = 0) -> NDArray[np.int64]:
    """Returns which of `count` prompts each replicate holds, (R + 1, P); the first row is the prompts as they are."""
    drawn = np.random.default_rng(key).integers(count, size=(REPLICATES, count))
    return np.concatenate([np.arange(count)[None], drawn])


def means(column: NDArray[np.float64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the mean of every replicate, leaving out what is NaN; NaN where nothing is left.

    Args:
        column: a number for each prompt, (P,).
        rows: from `choices`, (R + 1, P).
    """
    there = ~np.isnan(column)
    total = np.where(there, column, 0.0)[rows].sum(1)
    count = there[rows].sum(1)
    return np.divide(total, count, out=np.full(len(rows), np.nan), where=count > 0)


def estimate(replicates: NDArray[np.float64]) -> Estimate:
    """Turns replicates, (R + 1,), the first of which is the value itself, into a number with its percentile interval.

    Source: percentile bootstrap, Efron and Tibshirani 1993, chapter 13.
    """
    finite = replicates[1:][np.isfinite(replicates[1:])]
    value = float(replicates[0])
    if not len(finite):
        return Estimate(value, value, value)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(finite, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
