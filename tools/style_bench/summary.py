"""From scores to the numbers of the report: what each number means, how it is computed, and its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tools.style_bench import bootstrap
from tools.style_bench.bootstrap import Estimate
from tools.style_bench.measure import Scores

Replicates = NDArray[np.float64]
"""(R + 1,); the first is the number itself."""


class Means:
    """The mean of every column of every method, in every replicate of one style.

    Args:
        scores: method -> the scores of its subsets, at least one.
        key: another key, other replicates.
    """

    def __init__(self, scores: Mapping[str, Sequence[Scores]], key: int):
        self._columns = {
            (method, column): _over_subsets([s[column] for s in several if column in s])
            for method, several in scores.items()
            for column in several[0]
        }
        self._key = key
        self._rows: dict[int, NDArray[np.int64]] = {}
        self._known: dict[tuple[str, str], Replicates] = {}

    def __call__(self, method: str, column: str) -> Replicates:
        """Returns the replicates of a mean.

        Raises:
            KeyError: the method has not been measured, or not in this.
        """
        if (method, column) not in self._known:
            values = self._columns[method, column]
            if len(values) not in self._rows:
                self._rows[len(values)] = bootstrap.choices(len(values), self._key)
            self._known[method, column] = bootstrap.means(values, self._rows[len(values)])
        return self._known[method, column]


def _over_subsets(columns: Sequence[Sequence[float | None]]) -> NDArray[np.float64]:
    """Averages the same prompts over subsets, leaving out what is missing; NaN where all is."""
    values = np.array([[np.nan if v is None else v for v in column] for column in columns], dtype=np.float64)
    there = ~np.isnan(values)
    count = there.sum(0)
    return np.divide(np.where(there, values, 0).sum(0), count, out=np.full(len(count), np.nan), where=count > 0)


@dataclass(frozen=True)
class Measure:
    """A column of the report.

    Attributes:
        id: name in the JSON.
        title: name in the table.
        meaning: its definition, printed under the table.
        unit: "%": a share, printed times 100; "s": seconds; "": a plain number.
        of: (means, method) -> replicates; raises KeyError where it cannot be told.
    """

    id: str
    title: str
    meaning: str
    unit: str
    of: Callable[[Means, str], Replicates]


def _column(name: str) -> Callable[[Means, str], Replicates]:
    return lambda means, method: means(method, name)


def _ratio(name: str, reference: str) -> Callable[[Means, str], Replicates]:
    return lambda means, method: _divided(means(method, name), means(reference, name))


def _closure(name: str, more_is_better: bool = True) -> Callable[[Means, str], Replicates]:
    """Returns how far a method comes on the way from base to oracle; NaN if the oracle is no better than the base."""

    def of(means: Means, method: str) -> Replicates:
        base, oracle = means("base", name), means("oracle", name)
        gap = oracle - base
        useful = gap > 0 if more_is_better else gap < 0
        return _divided(means(method, name) - base, np.where(useful, gap, 0.0))

    return of


def _divided(a: Replicates, b: Replicates) -> Replicates:
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b != 0)


MEASURES: tuple[Measure, ...] = (
    Measure(
        "style",
        "style",
        "share of pictures that the style judge calls the style asked for, of the four held-out styles and another; "
        "for the base in its own styles, of all styles",
        "%",
        _column("style"),
    ),
    Measure("probability", "prob.", "mean probability that the style judge gives it", "%", _column("probability")),
    Measure(
        "top1",
        "top-1",
        "share of pictures whose concept comes first of all base concepts that no judge has seen, told by the concept "
        "judge from real pictures in all other styles",
        "%",
        _column("top1"),
    ),
    Measure("top5", "top-5", "the same, among its first five", "%", _column("top5")),
    Measure(
        "retention",
        "retention",
        "top-1 divided by that of the base in four of its own styles, same prompts and seeds",
        "",
        _ratio("top1", "own"),
    ),
    Measure(
        "joint", "joint", "share of pictures with the right style and the concept in the top 5", "%", _column("joint")
    ),
    Measure(
        "win",
        "paired win",
        "share of pictures nearer, in the style judge's last layer, to the real picture of the concept in the style "
        "asked for than to that in any other style",
        "%",
        _column("win"),
    ),
    Measure(
        "copy",
        "copies",
        "share of pictures nearer to a training picture than 99 % of real, unrelated pictures of the style come to one "
        "(thumbnails, moved a little); methods that learn nothing are compared with the LoRA's pictures: chance",
        "%",
        _column("copy"),
    ),
    Measure(
        "diversity",
        "diversity",
        "mean distance between the pictures of one prompt (thumbnails), divided by that of the base in its own styles",
        "",
        _ratio("diversity", "own"),
    ),
    Measure(
        "leak",
        "leak",
        "style, asked without the trigger word: the label alone, first seed of each prompt",
        "%",
        _column("leak"),
    ),
    Measure(
        "loss",
        "held-out loss",
        "denoising loss on 20 pictures of the style that nobody learned from, divided by the base's",
        "",
        _ratio("loss", "base"),
    ),
    Measure(
        "kernel",
        "KID",
        "kernel distance (unbiased MMD^2, cubic) of the style judge's features to those of all unseen real pictures of "
        "the style; no interval",
        "",
        _column("kernel"),
    ),
    Measure("style_closure", "closure, style", "style: (it - base) / (oracle - base)", "", _closure("style")),
    Measure("joint_closure", "closure, joint", "joint: (it - base) / (oracle - base)", "", _closure("joint")),
    Measure(
        "kernel_closure",
        "closure, KID",
        "KID: (it - base) / (oracle - base)",
        "",
        _closure("kernel", more_is_better=False),
    ),
    Measure("seconds", "training", "wall time of the training in seconds, on this machine", "s", _column("seconds")),
)


@dataclass(frozen=True)
class Goal:
    """A bar for the LoRA's mean over the styles."""

    measure: str
    at_least: bool
    bar: float

    def met_by(self, value: float) -> bool:
        """Tells whether a value is good enough."""
        return value >= self.bar if self.at_least else value <= self.bar


GOALS = (
    Goal("style", True, 0.92),
    Goal("retention", True, 0.93),
    Goal("joint", True, 0.75),
    Goal("copy", False, 0.02),
    Goal("style_closure", True, 0.85),
    Goal("joint_closure", True, 0.85),
    Goal("kernel_closure", True, 0.85),
)

Table = dict[str, dict[str, Estimate]]
"""Method -> measure -> number."""


def summarise(scores: Mapping[str, Mapping[str, Sequence[Scores]]]) -> tuple[dict[str, Table], Table]:
    """Computes all numbers.

    Args:
        scores: style -> method -> the scores of its subsets.

    Returns:
        Style -> table; and the table of the means over the styles. There a method has a number only if it has it in
        every style, for a mean over the easy ones would mislead.
    """
    means = {style: Means(by_method, key) for key, (style, by_method) in enumerate(scores.items())}
    methods = dict.fromkeys(method for by_method in scores.values() for method in by_method)
    tables: dict[str, Table] = {style: {} for style in scores}
    mean: Table = {}
    for method in methods:
        for measure in MEASURES:
            found = {style: r for style in scores if (r := _replicates(measure, means[style], method)) is not None}
            for style, replicates in found.items():
                tables[style].setdefault(method, {})[measure.id] = bootstrap.estimate(replicates)
            if len(found) == len(scores):
                whole = np.mean(list(found.values()), axis=0)
                mean.setdefault(method, {})[measure.id] = bootstrap.estimate(whole)
    return tables, mean


def _replicates(measure: Measure, means: Means, method: str) -> Replicates | None:
    try:
        replicates = measure.of(means, method)
    except KeyError:
        return None
    return replicates if np.isfinite(replicates[0]) else None


def subset_spread(several: Sequence[Scores], column: str = "style") -> float | None:
    """Returns the standard deviation of a column's mean over subsets, or `None` for fewer than two subsets."""
    if len(several) < 2:
        return None
    return float(np.std([np.nanmean(np.array(s[column], dtype=np.float64)) for s in several], ddof=1))
