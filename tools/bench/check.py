"""Before anything is timed: are the gradients right? Compared tensor by tensor with the reference loop in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tools.bench.inputs import Factors, Inputs
from tools.bench.ours import Side

MIN_COSINE = 0.999
LENGTH_TOLERANCE = 0.02
"""Relative, of a tensor's gradient: a forgotten factor turns no gradient, it only stretches it."""
LOSS_TOLERANCE = 5e-3
"""Relative. bf16 keeps 8 bits; over the elements of a prediction its roundings mostly cancel."""
SLACK = 4.0
"""Where the reference itself misses a bar on average, ours may miss it so many times as far as the reference.

Rounding is chance: over nine batches of nano in bf16 the reference's mean distance from 1 was 4e-4 to 31e-4, and
sdlora's was 0.15 to 2.6 times that of the same batch.
"""
WORST_SLACK = 10.0
"""The same of the worst tensor, which varies more: the reference was 4e-3 to 9e-3 off, ours 0.5 to 7.4 times as far."""


@dataclass(frozen=True)
class Gradients:
    """What a side computed for one batch: the loss, and the gradients by path."""

    loss: float
    factors: Factors


@dataclass(frozen=True)
class Agreement:
    """How a side's gradients lie to those of the fp32 run.

    Attributes:
        loss_error: relative error of the loss.
        cosines: by tensor, e.g. `mid_block....to_q.down`.
        lengths: relative errors of the tensors' norms.
    """

    loss_error: float
    cosines: Mapping[str, float]
    lengths: Mapping[str, float]

    @property
    def worst(self) -> tuple[str, float]:
        """The tensor whose direction is furthest off, and its cosine; one that is no number comes first."""
        return min(self.cosines.items(), key=lambda item: (not math.isnan(item[1]), item[1]))

    @property
    def worst_length(self) -> tuple[str, float]:
        """The tensor whose length is furthest off, and by how much; one that is no number comes first."""
        return max(self.lengths.items(), key=lambda item: (math.isnan(item[1]), item[1]))

    @property
    def mean(self) -> float:
        """Mean of all cosines."""
        return sum(self.cosines.values()) / len(self.cosines)


def compute(side: Side, inputs: Inputs) -> Gradients:
    """Lets a side compute one batch."""
    loss = float(side.forward_backward(inputs.drawn, inputs.conditioning))
    return Gradients(loss, side.gradients())


def compare(found: Gradients, truth: Gradients) -> Agreement:
    """Compares a side's gradients with those of the fp32 run.

    Raises:
        ValueError: if they are not of the same tensors.
    """
    if found.factors.keys() != truth.factors.keys():
        raise ValueError(
            f"gradients of {len(found.factors)} layers cannot be compared with {len(truth.factors)} others"
        )
    cosines, lengths = {}, {}
    for path, expected in truth.factors.items():
        for part, a, b in zip(("down", "up"), found.factors[path], expected, strict=True):
            cosines[f"{path}.{part}"] = cosine(a, b)
            lengths[f"{path}.{part}"] = length_error(a, b)
    return Agreement(abs(found.loss - truth.loss) / abs(truth.loss), cosines, lengths)


def cosine(a: Tensor, b: Tensor) -> float:
    """Returns the cosine of the angle between two tensors of a shape; 0 if one of them is all zeros, 1 if both are."""
    a, b = a.double().flatten(), b.double().flatten()
    one, other = float(a.norm()), float(b.norm())
    if one == other == 0:
        return 1.0
    return float(a @ b) / (one * other) if one * other > 0 else 0.0


def length_error(a: Tensor, b: Tensor) -> float:
    """Returns by what share of b's length a is longer or shorter; 0 if both are all zeros, infinite if only b is.

    A softmax that is certain has no gradient at all, not even in fp32; nano has one, in its smallest attention.
    """
    one, other = float(a.double().norm()), float(b.double().norm())
    if other == 0:
        return 0.0 if one == 0 else math.inf
    return abs(one / other - 1)


def objection(ours: Agreement, reference: Agreement | None) -> str:
    """Says what is wrong with our gradients; "" if nothing is.

    Every tensor's cosine must be `MIN_COSINE` and its length right within `LENGTH_TOLERANCE`. Some gradients are so
    small that bf16 misses that for anyone (nano has some, in its smallest attention): see `SLACK` and `WORST_SLACK`.

    Args:
        ours: compared with the fp32 run.
        reference: likewise; `None` if it could not run.
    """
    if not ours.loss_error <= LOSS_TOLERANCE:  # so that NaN fails too
        return f"the loss is {ours.loss_error:.2%} off that of the fp32 run"
    theirs = (1 - reference.worst[1], reference.worst_length[1], 1 - reference.mean) if reference else (0.0,) * 3
    name, found = ours.worst
    if not 1 - found <= max(1 - MIN_COSINE, WORST_SLACK * theirs[0]):
        return f"the gradient of {name} has cosine {found:.5f} with that of the fp32 run"
    if not 1 - ours.mean <= max(1 - MIN_COSINE, SLACK * theirs[2]):
        return f"the gradients have cosine {ours.mean:.5f} with those of the fp32 run on average"
    name, error = ours.worst_length
    if not error <= max(LENGTH_TOLERANCE, WORST_SLACK * theirs[1]):
        return f"the gradient of {name} is {error:.1%} longer or shorter than that of the fp32 run"
    return ""
