"""What a graph is made of: buffers that it reads, the computation, and the proof that a replay computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sdlora.training.engine import Engine, Inputs
from sdlora.training.rates import DeviceRates

TOLERANCE = 1e-3
"""Largest difference between a replay and the step without a graph, relative to what the step changed."""
SPREAD = 4.0
"""Where two steps without a graph already differ, e.g. since atomic additions come in any order, so many times that."""
MAX_TOLERANCE = 0.05
"""Whatever the spread."""

T = TypeVar("T")


class Recording(Protocol):
    """A recorded computation."""

    def replay(self) -> None:
        """Computes it again, with what lies in its buffers now."""
        ...

    def reset(self) -> None:
        """Gives its memory back."""
        ...


class Recorder(Protocol):
    """What records computations."""

    def record(self, compute: Callable[[], object]) -> Recording:
        """Runs a computation a few times, then records it, without running it, as a graph.

        Raises:
            RuntimeError: if it cannot be recorded.
        """
        ...

    def room(self) -> int:
        """Returns the bytes that the device can still give."""
        ...

    def peak(self, compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """Runs a computation; returns its result and the most bytes that it held at a time."""
        ...


class DiffersError(RuntimeError):
    """A replay did not give what the step gives without it."""


class Recorded(Generic[T]):
    """A part of a step that reads from buffers and leaves its result in one.

    Attributes:
        result: of the last run, a scalar on the device.
        recording: the graph, once `prove` has made it.
    """

    def __init__(self, device: torch.device) -> None:
        self.result = torch.zeros((), device=device)
        self.recording: Recording | None = None

    def fill(self, given: T) -> None:
        """Copies what is given into the buffers, without waiting."""
        raise NotImplementedError

    def compute(self) -> None:
        """Computes from the buffers without a graph."""
        raise NotImplementedError

    def __call__(self, given: T) -> Tensor:
        """Computes through the graph; returns the result in memory of its own, for the next replay writes over it."""
        assert self.recording
        self.fill(given)
        self.recording.replay()
        return self.result.clone()

    def reset(self) -> None:
        """Gives the graph back."""
        if self.recording:
            self.recording.reset()


class Pass(Recorded[Inputs]):
    """Forward and backward pass of one kind of batch."""

    def __init__(self, engine: Engine, inputs: Inputs) -> None:
        super().__init__(engine.device)
        self.engine = engine
        self.buffers = {name: torch.empty(x.shape, dtype=x.dtype, device=engine.device) for name, x in inputs.items()}

    def fill(self, given: Inputs) -> None:
        """Copies a batch of that kind."""
        for name, x in given.items():
            self.buffers[name].copy_(x, non_blocking=True)

    def compute(self) -> None:
        """Adds the batch's gradients to those of the step."""
        self.result.copy_(self.engine.compute(self.buffers))


class Update(Recorded[Tensor]):
    """Clipping and the optimizer's step."""

    def __init__(self, engine: Engine, rates: DeviceRates) -> None:
        super().__init__(engine.device)
        self.engine, self.rates = engine, rates
        self.loss = torch.zeros((), device=engine.device)

    def fill(self, given: Tensor) -> None:
        """Copies the step's loss."""
        self.loss.copy_(given)

    def compute(self) -> None:
        """Clips and steps."""
        with self.rates.installed():
            self.result.copy_(self.engine.apply(self.loss))


class Anchors:
    """Where the denoiser's tensors lay when a graph that reads them was recorded.

    They are held, so that what a graph reads stays valid. Moving them is noticed. Whoever puts other tensors in their
    place, i.e. replaces layers, has to set `Engine.graphs` to `None`.
    """

    def __init__(self, engine: Engine) -> None:
        denoiser = engine.parts.denoiser
        self._tensors = [*denoiser.parameters(), *denoiser.buffers()]
        self._places = self._now()

    def _now(self) -> list[int]:
        return list(map(Tensor.data_ptr, self._tensors))  # at every step: 0.08 ms for SD 1.5, 0.4 ms for SDXL

    @property
    def moved(self) -> bool:
        """Whether anything lies elsewhere now."""
        return self._now() != self._places


def prove(recorder: Recorder, trial: Recorded[Any], result: Tensor, state: list[Tensor], before: list[Tensor]) -> bool:
    """Records what has just been computed without a graph, and compares; leaves the state as it is now.

    Returns:
        Whether it was recorded; not if the step's numbers are not finite, for then they prove nothing.

    Raises:
        RuntimeError: if it cannot be recorded, or gives other results.
    """
    after = [x.clone() for x in state]
    if not all(bool(x.isfinite().all()) for x in (result, *after)):
        return False
    try:
        _put(state, before)
        trial.compute()
        spread = _distance([trial.result, *state], [result, *after], before)
        _put(state, before)
        trial.recording = recorder.record(trial.compute)
        _put(state, before)
        trial.recording.replay()
        distance = _distance([trial.result, *state], [result, *after], before)
    finally:
        _put(state, after)
    allowed = min(max(TOLERANCE, SPREAD * spread), MAX_TOLERANCE)
    if not distance <= allowed:  # so that NaN fails too
        trial.recording.reset()
        raise DiffersError(f"a replay was {distance:.1e} away from the step itself, and {allowed:.1e} is allowed")
    return True


def _put(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for x, value in zip(state, values, strict=True):
            x.copy_(value)


def _distance(got: Sequence[Tensor], expected: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Returns the largest relative difference; of the first tensor by its size, of others by how far they moved."""
    starts = [torch.zeros_like(expected[0]), *before]
    rows = zip(got, expected, starts, strict=True)
    return max(_relative(a.detach().float(), b.detach().float(), c.detach().float()) for a, b, c in rows)


def _relative(got: Tensor, expected: Tensor, start: Tensor) -> float:
    difference, moved = float((got - expected).norm()), float((expected - start).norm())
    return difference / moved if moved else difference
