"""One row: both sides are built, checked against an fp32 run, and timed turn by turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sdlora.errors import SdloraError
from sdlora.families import Parts
from sdlora.families.folders import quiet
from tools.bench.apart import Apart
from tools.bench.bases import load_base
from tools.bench.check import Gradients, compare, compute, objection
from tools.bench.inputs import Inputs, make_factors, make_inputs
from tools.bench.measure import Rounds, one_after_the_other, quartiles, ratio, take_turns, wait
from tools.bench.memory import Peak
from tools.bench.operations import count_operations
from tools.bench.ours import Side, build_ours
from tools.bench.reference import Reference
from tools.bench.results import OURS, OUT_OF_MEMORY, REFERENCE, RowResult, SideResult
from tools.bench.rows import Row

SETTLING = 3
"""Steps after which a side has measured, packed and recorded what it does once."""
BATCHES = 4
"""Cached batches that a side goes around in."""

T = TypeVar("T")
Build = Callable[[Row, Parts], Side]


def build_reference(row: Row, parts: Parts) -> Side:
    """Builds the reference loop around a base."""
    return Reference(parts.denoiser, parts.scheduler_config, checkpointing=row.checkpointing)


BUILDERS: Mapping[str, Build] = {OURS: build_ours, REFERENCE: build_reference}


class Entrant(Protocol):
    """A side that has done its first steps, in this process or in one of its own."""

    gradients: Gradients

    @property
    def notes(self) -> list[str]:
        """What the side says of how it computes."""
        ...

    def step(self) -> None:
        """Does an optimizer step on the next batch."""
        ...

    def operations(self) -> int:
        """Returns how many operations an optimizer step dispatches when nothing is recorded."""
        ...

    def frozen_weights(self) -> dict[str, Tensor]:
        """Returns the weights that the side computes with where they are not the base's own, by layer."""
        ...

    def end(self) -> None:
        """Lets go of what it holds beyond its own memory."""
        ...


@dataclass
class Contender:
    """A side that has done its first steps.

    Attributes:
        side: what computes.
        inputs: its batches.
        gradients: what it computed for the first of them, before any update.
    """

    side: Side
    inputs: list[Inputs]
    gradients: Gradients

    @cached_property
    def _batches(self) -> Iterator[Inputs]:
        return cycle(self.inputs)

    @property
    def notes(self) -> list[str]:
        """What the side says of how it computes."""
        return list(self.side.notes)

    def step(self) -> None:
        """Does an optimizer step on the next batch."""
        batch = next(self._batches)
        self.side.step(batch.drawn, batch.conditioning)

    def operations(self) -> int:
        """Returns how many operations an optimizer step dispatches when nothing is recorded."""
        self._eager_step()  # what happens only once shall not be counted
        return count_operations(self._eager_step)

    def _eager_step(self) -> None:
        batch = self.inputs[0]
        self.side.forward_backward(batch.drawn, batch.conditioning)
        self.side.update()

    def frozen_weights(self) -> dict[str, Tensor]:
        """Returns the weights that the side computes with where they are not the base's own, by layer."""
        return self.side.frozen_weights()

    def end(self) -> None:
        """Does nothing: what is not referred to any more is freed."""


def prepare(build: Build, row: Row, device: torch.device, found: SideResult) -> Contender:
    """Builds a side, lets it do a few steps, and records the memory that this takes.

    Raises:
        torch.OutOfMemoryError: if it does not fit.
    """
    peak = Peak(device)
    parts = load_base(row, device)
    inputs = make_inputs(row, parts, BATCHES)
    factors = make_factors(parts, parts.denoiser)
    side = build(row, parts)
    side.set_factors(factors)
    contender = Contender(side, inputs, compute(side, inputs[0]))
    side.update()
    for _ in range(SETTLING):
        contender.step()
    wait(device)
    found.building_bytes = peak.bytes
    peak.reset()
    contender.step()
    wait(device)
    found.peak_bytes = peak.bytes
    return contender


@dataclass
class Contest:
    """The sides of one row on one device.

    Attributes:
        row: what is measured.
        device: where.
        builders: what builds the sides, in this order.
        result: what was found so far.
        apart: whether each side has a process of its own, with so many threads, 0 for torch's number; `None`: all
            compute in this process, as on a GPU, where the memory that counts is the device's.
        ready: the sides that are in memory now.
    """

    row: Row
    device: torch.device
    builders: Mapping[str, Build] = field(default_factory=lambda: BUILDERS)
    result: RowResult = field(default_factory=RowResult)
    apart: int | None = None
    ready: dict[str, Entrant] = field(default_factory=dict)

    def run(self, *, rounds: int, limit: float) -> RowResult:
        """Measures the row; on the CPU all but the memory, unless each side has a process of its own.

        Args:
            rounds: how often each side takes its turn.
            limit: seconds after which no new round begins.
        """
        gradients = {name: self._first_steps(name) for name in self.builders}
        self._check({name: found for name, found in gradients.items() if found})
        if not self.result.objection:
            self._time(rounds, limit)
        if self.device.type == "cpu" and self.apart is None:
            for side in self.result.sides.values():
                side.peak_bytes = side.building_bytes = None
        return self.result

    def release(self) -> None:
        """Lets go of all sides and the memory that they took."""
        for name in list(self.ready):
            self.ready.pop(name).end()
        free(self.device)

    def _fit(self, make: Callable[[], T]) -> T:
        """Makes something, without the sides that are ready if it does not fit beside them."""
        with suppress(torch.OutOfMemoryError):
            return make()
        self.release()  # not while the error is handled: it holds what was half made
        return make()

    def _prepare(self, name: str) -> Entrant:
        if name not in self.ready:
            contender = self._fit(lambda: self._make(name))
            self.ready[name] = contender
        return self.ready[name]

    def _make(self, name: str) -> Entrant:
        found = self.result.sides[name]
        if self.apart is not None:
            return Apart(name, self.row, found, self.apart)
        return prepare(self.builders[name], self.row, self.device, found)

    def _first_steps(self, name: str) -> Gradients | None:
        """Returns what a side computes for the first batch; `None` if it does not fit or cannot be built."""
        found = self.result.sides[name]
        try:
            contender = self._prepare(name)
            found.operations = contender.operations()
            found.notes = contender.notes
        except torch.OutOfMemoryError:
            found.problem = OUT_OF_MEMORY
        except SdloraError as error:
            found.problem = str(error)
        else:
            return contender.gradients
        if name in self.ready:
            self.ready.pop(name).end()
        free(self.device)
        return None

    def _check(self, gradients: Mapping[str, Gradients]) -> None:
        """Compares the gradients with those of an fp32 run over the weights that sdlora computes with."""
        if OURS not in gradients:
            return
        weights = self._prepare(OURS).frozen_weights()
        try:
            truth = self._fit(lambda: exact_gradients(self.row, self.device, weights))
        except torch.OutOfMemoryError:
            return
        finally:
            free(self.device)
        # With weights of fewer bits the two sides do not compute with the same numbers.
        comparable = [name for name in gradients if name == OURS or not weights]
        agreements = {name: compare(gradients[name], truth) for name in comparable}
        for name, agreement in agreements.items():
            self.result.sides[name].record(agreement)
        self.result.checked = True
        self.result.objection = objection(agreements[OURS], agreements.get(REFERENCE))

    def _time(self, rounds: int, limit: float) -> None:
        names = [name for name in self.builders if not self.result.sides[name].problem]
        times = self._together(names, rounds, limit)
        if times is None:  # both do not fit at once: one after the other
            alone = []
            for name in names:
                self.release()
                alone.append(take_turns({name: self._prepare(name).step}, rounds=rounds, limit=limit / 2))
            times = one_after_the_other(alone)
            self.result.together = False
        for name, seconds in times.seconds.items():
            self.result.sides[name].seconds = quartiles(seconds)
            self.result.sides[name].host_seconds = quartiles(times.host[name]) if self.device.type == "cuda" else None
        self.result.rounds = times.count
        if {REFERENCE, OURS} <= times.seconds.keys():
            self.result.ratio = ratio(times.seconds[REFERENCE], times.seconds[OURS])

    def _together(self, names: list[str], rounds: int, limit: float) -> Rounds | None:
        with suppress(torch.OutOfMemoryError):
            steps = {name: self._prepare(name).step for name in names}
            if len(self.ready) == len(names):  # else the last one pushed another out
                return take_turns(steps, rounds=rounds, limit=limit, device=self.device)
        return None


def exact_gradients(row: Row, device: torch.device, weights: Mapping[str, Tensor]) -> Gradients:
    """Lets the reference loop compute the first batch in fp32, with activations computed again to save memory.

    Args:
        row: what is measured.
        device: where.
        weights: by layer, in place of the base's: what sdlora computes with if it holds them in fewer bits.
    """
    parts = load_base(row, device)
    inputs = make_inputs(row, parts, 1)[0].to(torch.float32)
    factors = make_factors(parts, parts.denoiser)
    with quiet():
        parts.denoiser.float()
    with torch.no_grad():
        for path, weight in weights.items():
            layer: Any = parts.denoiser.get_submodule(path)
            layer.weight.copy_(weight)
    side = Reference(parts.denoiser, parts.scheduler_config, checkpointing=True)
    side.set_factors(factors)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return compute(side, inputs)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def free(device: torch.device) -> None:
    """Gives memory that nothing refers to any more back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
