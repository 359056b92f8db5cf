"""The course of the learning rate: pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(progress: float) -> float:
    """Stays at 1."""
    return 1.0


def linear(progress: float) -> float:
    """Falls from 1 to 0 in a straight line."""
    return 1.0 - progress


def cosine(progress: float) -> float:
    """Falls from 1 to 0 along half a cosine. Source: Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {"cosine": cosine, "constant": constant, "linear": linear}


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int, schedule: str) -> float:
    """Returns the factor on the learning rate at a step.

    Args:
        step: counted from 0.
        total_steps: steps of the whole run.
        warmup_steps: the factor climbs over these and reaches 1 at step `warmup_steps`. Unlike in transformers'
            schedules the first step is above zero, for a step at zero teaches nothing.
        schedule: a name in `SCHEDULES`.

    Returns:
        A number in (0, 1].

    Source: after the warm-up equal to transformers' `get_cosine_schedule_with_warmup` and its linear sister.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return SCHEDULES[schedule]((step - warmup_steps) / max(1, total_steps - warmup_steps))
