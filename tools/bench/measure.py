"""Times two ways of doing the same step fairly: turn by turn, order reversed each round, and with an interval."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 2000
MIN_ROUNDS = 3
"""Rounds that are measured even if the time is used up, so that there is a spread."""
SHORTEST_TURN = 1.0
"""Seconds. Steps are repeated within a turn until they take about that long, so that the clock and the wait for the
device, and what the other side left in the processor's caches, count for nothing."""


@dataclass(frozen=True)
class Spread:
    """A measured quantity: its median, and how far it reaches to both sides.

    Attributes:
        median: half the values are smaller.
        low: lower end: the first quartile, or that of a 95 % interval.
        high: upper end.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Rounds:
    """Seconds a step took, by contender, one number a round, all lists of the same length.

    Attributes:
        seconds: a step's time, the device's work included.
        host: the part of it after which the program could go on with something else.
    """

    seconds: Mapping[str, Sequence[float]]
    host: Mapping[str, Sequence[float]]

    @property
    def count(self) -> int:
        """Number of rounds."""
        return min(map(len, self.seconds.values()))


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    limit: float = math.inf,
    warm_up: int = 1,
    device: torch.device | None = None,
) -> Rounds:
    """Lets each contender step once a round; odd rounds go backwards, so that nobody always runs on a warm machine.

    Args:
        steps: the contenders by name; each call is one whole optimizer step.
        rounds: how many.
        limit: seconds after which no new round begins, once there are `MIN_ROUNDS`.
        warm_up: steps of each that are not counted.
        device: where they compute; its queue is empty before and after each turn.
    """
    device = device or torch.device("cpu")
    started = time.perf_counter()
    slowest = 0.0
    for step in steps.values():
        for _ in range(warm_up):
            step()
        slowest = max(slowest, sum(_turn(step, 1, device)))
    repeats = max(1, round(SHORTEST_TURN / slowest)) if slowest else 1
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    host: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        if number >= MIN_ROUNDS and time.perf_counter() - started > limit:
            break
        order = list(steps)
        for name in order if number % 2 == 0 else reversed(order):
            launched, waited = _turn(steps[name], repeats, device)
            host[name].append(launched / repeats)
            seconds[name].append((launched + waited) / repeats)
    return Rounds(seconds, host)


def _turn(step: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Returns the seconds until the last step was handed over, and the seconds that the device then still took."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    launched = time.perf_counter()
    wait(device)
    return launched - start, time.perf_counter() - launched


def wait(device: torch.device) -> None:
    """Waits until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_after_the_other(alone: Sequence[Rounds]) -> Rounds:
    """Puts the rounds of contenders that were timed one by one side by side, as many as all have."""
    count = min(rounds.count for rounds in alone)
    seconds = {name: values[:count] for rounds in alone for name, values in rounds.seconds.items()}
    host = {name: values[:count] for rounds in alone for name, values in rounds.host.items()}
    return Rounds(seconds, host)


def quartiles(values: Sequence[float]) -> Spread:
    """Returns the median between the quartiles of at least one value."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return Spread(float(middle), float(low), float(high))


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """Returns how many times faster the second is: the median of the rounds' ratios and its 95 % interval.

    Rounds, not single numbers, are drawn anew, so what slows both sides of a round down does not widen the interval.

    Args:
        slow: seconds of one side, one number a round.
        fast: of the other, of the same rounds.

    Raises:
        ValueError: if they have not as many rounds as each other, or none.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife", the percentile interval.
    """
    if len(slow) != len(fast) or not slow:
        raise ValueError(f"a ratio needs the same rounds of both sides, got {len(slow)} and {len(fast)}")
    pairs = np.asarray(slow) / np.asarray(fast)
    drawn = np.random.default_rng(0).integers(len(pairs), size=(RESAMPLES, len(pairs)))
    low, high = np.percentile(np.median(pairs[drawn], axis=1), [2.5, 97.5])
    return Spread(statistics.median(pairs.tolist()), float(low), float(high))
