"""From a limit to the fastest way of training that stays within it, and from there down when memory runs out.

The ways are rungs of a ladder, fastest first: no savings, checkpointing of attention blocks, of all blocks, smaller
micro-batches, a base of 8 bits, of 4 bits, and at last a base that waits in main memory. None of them changes what a
step is: the batch stays as large as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from sdlora.config import TrainSection
from sdlora.errors import TrainingError
from sdlora.training.forecast import Forecast
from sdlora.training.progress import Reporter
from sdlora.training.savings import Rung, put_to_work, size_in_words

T = TypeVar("T")

_LEVELS = ("none", "attention", "all")
_SMALLER = ("int8", "nf4")
"""Formats that are tried, fewer bits after more. fp8 takes the bytes of int8 and rounds four times as much."""


def rungs(settings: TrainSection, batch: int, device: torch.device) -> list[Rung]:
    """Returns the ladder, fastest first. What the user has set is the same on all rungs.

    Without a limit of the user's a CPU keeps the base's weights as they are, for they may be packed.

    Args:
        settings: of the loop.
        batch: pictures of a batch in this process.
        device: where training runs.
    """
    smaller = _SMALLER if device.type == "cuda" or settings.memory != "auto" else ()
    micro = [settings.micro_batch or batch]
    while settings.micro_batch is None and micro[-1] > 1:
        micro.append(-(-micro[-1] // 2))
    levels = _LEVELS if settings.gradient_checkpointing == "auto" else (settings.gradient_checkpointing,)
    formats = ("auto", *smaller) if settings.base_dtype == "auto" else (settings.base_dtype,)
    places = (False, True) if settings.offload == "auto" and device.type == "cuda" else (settings.offload == "on",)
    ladder = [Rung(micro[0], levels[0], formats[0], places[0])]
    for name, values in (
        ("checkpointing", levels),
        ("micro_batch", micro),
        ("base_dtype", formats),
        ("offload", places),
    ):
        ladder += [Rung(**{**ladder[-1].facts(), name: value}) for value in values[1:]]
    return ladder


def first_that_fits(ladder: Sequence[Rung], forecast: Forecast, limit: int) -> int:
    """Returns the number of the fastest rung that fits, or of the last one."""
    fits = (i for i, rung in enumerate(ladder) if forecast.total(rung) <= limit)
    return next(fits, len(ladder) - 1)


class Ladder:
    """Where a run stands on its ladder, and its way down when memory runs out.

    Args:
        ladder: fastest first.
        at: number of the rung to begin with.
        denoiser: what the savings are put to work in.
        device: where products are computed.
        batch: pictures of a batch in this process.
        dropout: whether blocks that are computed again draw random numbers.
        reporter: told what is done.
        limit: bytes that the user allows; on a GPU torch reports to be out of memory beyond.

    Attributes:
        changed: called with the new rung after every move, e.g. to drop what was recorded on the last one.
        forecast: what each rung takes, or `None` where that was plain without looking.
    """

    def __init__(
        self,
        ladder: Sequence[Rung],
        at: int,
        denoiser: nn.Module,
        device: torch.device,
        *,
        batch: int,
        dropout: bool,
        reporter: Reporter,
        limit: int | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        self._rungs, self._at, self._denoiser, self._device = ladder, at, denoiser, device
        self._batch, self._dropout, self._reporter, self._limit = batch, dropout, reporter, limit
        self.forecast = forecast
        self.changed: Callable[[Rung], None] = lambda rung: None
        self._measured = False
        self._work()
        if device.type == "cuda":
            if limit is not None:
                whole = torch.cuda.get_device_properties(device).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def rung(self) -> Rung:
        """Where the run stands."""
        return self._rungs[self._at]

    @property
    def room(self) -> int | None:
        """Bytes that the limit leaves beside what the rung takes; `None` where the user set none."""
        if self._limit is None or self.forecast is None:
            return self._limit
        return self._limit - self.forecast.total(self.rung)

    def _work(self) -> None:
        said = put_to_work(self._denoiser, self.rung, self._device, dropout=self._dropout)
        if said:
            self._reporter.say(said)
        empty_cache(self._device)

    def climb(self) -> bool:
        """Goes one rung down for the rest of the run; returns whether there was one."""
        if self._at + 1 >= len(self._rungs):
            return False
        self._at += 1
        self._measured = False
        self._reporter.warn(f"out of memory; going on with {self.rung.words(self._batch)}, batches as large as before")
        self.changed(self.rung)
        self._work()
        return True

    def run(self, step: Callable[[], T]) -> T:
        """Computes a step, and again one rung further down as long as memory runs out.

        Args:
            step: computes gradients from scratch, so that a second call forgets what the first one left.

        Raises:
            torch.OutOfMemoryError: if even the last rung is too much.
        """
        while True:
            try:
                result = step()
                break
            except torch.OutOfMemoryError:
                if self._at + 1 >= len(self._rungs):
                    raise
            self.climb()  # outside of the handler, which holds what did not fit
        if not self._measured:
            self._measured = True
            self._measure()
        return result

    def _measure(self) -> None:
        """Corrects the forecast by what the first step on a rung took, where the device tells."""
        if self.forecast is None or self._device.type != "cuda":
            return
        peak = torch.cuda.max_memory_allocated(self._device)
        said = size_in_words(self.forecast.total(self.rung))
        self.forecast = self.forecast.corrected(self.rung, peak)
        self._reporter.say(f"Memory: the first step took {size_in_words(peak)} (forecast {said}).")

    def facts(self) -> Mapping[str, Any]:
        """Returns the rung as JSON values, for a checkpoint."""
        return self.rung.facts()


def recorded_rung(ladder: Sequence[Rung], facts: Mapping[str, Any] | None) -> int:
    """Returns the number of the rung that a run stood on when its checkpoint was written, 0 if that is not known.

    Raises:
        TrainingError: if the base's number format was one that the settings of today do not reach: the LoRA has learned
            to live with the rounding of that one.
    """
    if not facts:
        return 0
    recorded = Rung(**facts)
    if recorded in ladder:
        return ladder.index(recorded)
    same = [i for i, rung in enumerate(ladder) if rung.base_dtype == recorded.base_dtype]
    if not same:
        raise TrainingError(
            f"the run was going on with the base's weights in {recorded.base_dtype}; give --base-dtype "
            f"{recorded.base_dtype}, or start a new run"
        )
    return same[0]


def empty_cache(device: torch.device) -> None:
    """Gives memory that torch keeps for later back to the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
