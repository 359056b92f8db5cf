"""What comes out of a row, in plain values that JSON can hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tools.bench.check import Agreement
from tools.bench.measure import Spread

REFERENCE, OURS = "reference", "sdlora"
OUT_OF_MEMORY = "out of memory"


@dataclass
class SideResult:
    """What was measured of one side; `None` is what was not.

    Attributes:
        problem: why it was not measured, e.g. `OUT_OF_MEMORY`.
        seconds: of an optimizer step.
        host_seconds: the part of a step in which the program is busy handing over work to a GPU.
        operations: dispatched in an optimizer step that is not captured.
        peak_bytes: memory at the peak of a step, beyond what the process took before the base was built.
        building_bytes: likewise, until the first step was done.
        loss_error: of the loss, relative to the fp32 run.
        worst_cosine: of a tensor's gradient with that of the fp32 run.
        worst_tensor: which one that is.
        mean_cosine: over all tensors.
        worst_length: largest relative error of a tensor's norm.
        notes: what the side says of how it computes.
    """

    problem: str = ""
    seconds: Spread | None = None
    host_seconds: Spread | None = None
    operations: int | None = None
    peak_bytes: int | None = None
    building_bytes: int | None = None
    loss_error: float | None = None
    worst_cosine: float | None = None
    worst_tensor: str = ""
    mean_cosine: float | None = None
    worst_length: float | None = None
    notes: list[str] = field(default_factory=list)

    def record(self, agreement: Agreement) -> None:
        """Writes down how the gradients agree with those of the fp32 run."""
        self.loss_error, self.mean_cosine = agreement.loss_error, agreement.mean
        self.worst_tensor, self.worst_cosine = agreement.worst
        self.worst_length = agreement.worst_length[1]


@dataclass
class RowResult:
    """What was measured of a row.

    Attributes:
        sides: by `REFERENCE` and `OURS`.
        ratio: how many times faster sdlora's step is.
        rounds: in which both stepped.
        objection: why nothing was timed; "" if the gradients are right.
        checked: whether there was an fp32 run to check against.
        together: whether both sides were in memory at once and took turns.
    """

    sides: dict[str, SideResult] = field(default_factory=lambda: {REFERENCE: SideResult(), OURS: SideResult()})
    ratio: Spread | None = None
    rounds: int = 0
    objection: str = ""
    checked: bool = False
    together: bool = True


def complete(found: dict[str, Any], flop: int, rate: float) -> dict[str, Any]:
    """Adds what follows from a row's numbers: steps a second, the floor, and how much of the peak each side reaches.

    Args:
        found: a `RowResult` in plain values; is changed.
        flop: what a step cannot do without.
        rate: flop a second of the machine's best product.
    """
    found["floor"] = {"flop": flop, "flop_per_second": rate, "seconds": flop / rate}
    for side in found["sides"].values():
        seconds = side["seconds"]
        if seconds:
            side["steps_per_second"] = 1 / seconds["median"]
            side["share_of_peak"] = flop / rate / seconds["median"]
    first, second = (found["sides"][name]["operations"] for name in (REFERENCE, OURS))
    found["operations_ratio"] = second / first if first and second else None
    first, second = (found["sides"][name]["peak_bytes"] for name in (REFERENCE, OURS))
    found["memory_ratio"] = second / first if first and second else None
    return found
