"""Steps as CUDA graphs: thousands of kernels that Python starts at once instead of one by one.

A graph is recorded for the forward and backward pass of each kind of batch (shapes of latents and texts), and one for
the update; so the batches of an accumulated step share a graph, and gradients can be exchanged between the two. A graph
reads and writes fixed places in memory, so a batch is copied into buffers before it is replayed. Before a graph is
trusted it has computed a step that was also computed without it, and had the same result.

Source: torch's notes "CUDA semantics, CUDA graphs" (warm-up on a side stream, static inputs, one pool for all).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from sdlora.config import Config
from sdlora.errors import ConfigError, TrainingError
from sdlora.training.device import first_line
from sdlora.training.engine import Engine, Inputs
from sdlora.training.graph_cuda import CudaRecorder
from sdlora.training.rates import DeviceRates
from sdlora.training.recording import Anchors, Pass, Recorder, Update, prove

CAPTURE_AT = 2
"""Which batch of a kind is recorded: one that comes only once does not repay the five passes that recording takes."""
MAX_SHAPES = 32
"""Graphs at a time; each takes some ten megabytes beside the memory that all share."""
_OBSTACLES: tuple[tuple[str, Callable[[Config], bool]], ...] = (
    ("a graph would repeat what lora.dropout hides", lambda config: config.lora.dropout > 0),
    ("text encoders that train are computed for each caption anew", lambda config: config.lora.text_encoder),
)


class _NoRoom(RuntimeError):
    """A graph of this kind of batch does not fit into memory; another may."""


class GraphedSteps:
    """An engine's steps through graphs, or without them where that is not possible.

    Args:
        engine: computes without graphs.
        recorder: makes graphs.
        say: told once why graphs are not used any more, or not for all batches.
        required: whether it is then an error.
        limit: graphs at a time. The one that was not used for longest makes room, and is not recorded again, for where
            kinds come by turns it would be recorded at every turn.

    Attributes:
        abandoned: why graphs are not used any more, or `None`.
    """

    def __init__(
        self,
        engine: Engine,
        recorder: Recorder,
        say: Callable[[str], None],
        *,
        required: bool = False,
        limit: int = MAX_SHAPES,
    ) -> None:
        self.engine, self.recorder, self.say, self.required, self.limit = engine, recorder, say, required, limit
        self.abandoned: str | None = None
        self.rates = DeviceRates(engine.optimizer, engine.device)
        self._passes: OrderedDict[_Kind, Pass] = OrderedDict()
        self._seen: Counter[_Kind] = Counter()
        self._excluded: set[_Kind] = set()
        self._update: Update | None = None
        self._pool_bytes = 0
        self._anchors: Anchors | None = None

    @property
    def kinds(self) -> int:
        """How many kinds of batches have a graph."""
        return len(self._passes)

    def compute(self, inputs: Inputs) -> Tensor:
        """Adds the gradients of a batch to those of the step; see `Engine.compute`."""
        self._forget_if_moved()
        kind = _kind(inputs)
        if kind in self._passes:
            self._passes.move_to_end(kind)
            return self._passes[kind](inputs)
        self._seen[kind] += 1
        if self.abandoned or kind in self._excluded or self._seen[kind] < CAPTURE_AT:
            return self.engine.compute(inputs)
        return self._record_pass(kind, inputs)

    def apply(self, loss: Tensor) -> Tensor:
        """Clips and steps; see `Engine.apply`. The first step prepares the optimizer, so it is never recorded."""
        self.rates.load()
        if self._update:
            return self._update(loss)
        started = bool(self.engine.optimizer.state)
        if self.abandoned or not started or not self.rates.recordable:
            with self.rates.installed():
                return self.engine.apply(loss)
        return self._record_update(loss)

    def _record_pass(self, kind: _Kind, inputs: Inputs) -> Tensor:
        trial = Pass(self.engine, inputs)
        trial.fill(inputs)
        state = [self.engine.flat.gradients]
        before = [x.clone() for x in state]
        room = self.recorder.room()
        loss, needed = self.recorder.peak(lambda: self.engine.compute(trial.buffers))
        try:
            # The graph keeps what it needs, and batches without a graph, and pictures, need as much again.
            more = max(0, needed - self._pool_bytes)
            if more + needed > room - self._pool_bytes:
                raise _NoRoom(f"that takes {more / 1e9:.1f} GB beside the step's own, {room / 1e9:.1f} GB are free")
            if prove(self.recorder, trial, loss, state, before):
                self._keep(kind, trial)
                self._pool_bytes = max(self._pool_bytes, needed)
        except (_NoRoom, torch.OutOfMemoryError) as error:
            self._exclude(kind, first_line(error))
        except RuntimeError as error:
            self._abandon(error)
        return loss

    def _record_update(self, loss: Tensor) -> Tensor:
        trial = Update(self.engine, self.rates)
        trial.fill(loss)
        state = self.engine.tensors
        before = [x.clone() for x in state]
        with self.rates.installed():
            norm = self.engine.apply(trial.loss)
        try:
            if prove(self.recorder, trial, norm, state, before):
                self._update = trial
        except RuntimeError as error:
            self._abandon(error)
        return norm

    def _keep(self, kind: _Kind, made: Pass) -> None:
        self._anchors = self._anchors or Anchors(self.engine)
        self._passes[kind] = made
        if len(self._passes) > self.limit:
            oldest, dropped = self._passes.popitem(last=False)
            dropped.reset()
            self._exclude(oldest, f"graphs are kept for {self.limit} kinds of batches only")

    def _exclude(self, kind: _Kind, why: str) -> None:
        if self.required:
            raise TrainingError(f"train.cuda_graph is on, and not all batches can have a graph: {why}; use auto")
        if not self._excluded:
            self.say(f"Some batches are computed without a CUDA graph: {why}")
        self._excluded.add(kind)

    def _abandon(self, error: RuntimeError) -> None:
        self._forget()
        self.abandoned = first_line(_first(error))
        if self.required:
            raise TrainingError(f"train.cuda_graph is on, and recording failed: {self.abandoned}; use auto") from error
        self.say(f"No CUDA graphs, so steps take longer: {self.abandoned}")

    def _forget_if_moved(self) -> None:
        # Whoever moves or replaces weights between steps, e.g. for pictures, would leave graphs with dead addresses.
        if self._anchors and self._anchors.moved:
            self._forget()

    def _forget(self) -> None:
        for made in (*self._passes.values(), *([self._update] if self._update else [])):
            with suppress(RuntimeError):  # after a failed recording the driver may refuse even this
                made.reset()
        self._passes.clear()
        self._update, self._anchors = None, None


def _first(error: BaseException) -> Exception:
    """Returns what went wrong first: torch ends a spoiled recording with an error that only says so."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    assert isinstance(error, Exception)
    return error


_Kind = tuple[tuple[str, torch.Size, torch.dtype], ...]


def _kind(inputs: Inputs) -> _Kind:
    return tuple((name, x.shape, x.dtype) for name, x in inputs.items())


def choose_graphs(config: Config, device: torch.device, obstacles: Sequence[str] = ()) -> tuple[bool, str]:
    """Tells whether steps are to be recorded as graphs, and why.

    Args:
        config: the settings; `train.cuda_graph` is `auto`, `on` or `off`.
        device: where training runs.
        obstacles: more reasons against it, e.g. that the base does not stay on the device.

    Raises:
        ConfigError: if it is `on` and cannot be.
    """
    wanted = config.train.cuda_graph
    if wanted == "off":
        return False, "as asked for"
    against = [f"they are for CUDA, and this is {device.type}"] if device.type != "cuda" else []
    against += [why for why, found in _OBSTACLES if found(config)] + list(obstacles)
    if not against:
        return True, "as asked for" if wanted == "on" else "a step's kernels are started together"
    if wanted == "on":
        raise ConfigError(f"train.cuda_graph is on, and that does not go together: {'; '.join(against)}; use auto")
    return False, "; ".join(against)


def record_steps(
    engine: Engine, config: Config, say: Callable[[str], None], obstacles: Sequence[str] = ()
) -> tuple[bool, str]:
    """Lets an engine record its steps, where that is possible; returns what `choose_graphs` does.

    Args:
        engine: as it trains, adapters in place and checkpoint restored.
        config: the settings.
        say: told once if graphs are given up later.
        obstacles: see `choose_graphs`.
    """
    chosen, why = choose_graphs(config, engine.device, obstacles)
    if chosen:
        required = config.train.cuda_graph == "on"
        engine.graphs = GraphedSteps(engine, CudaRecorder(engine.device), say, required=required)
    return chosen, why
