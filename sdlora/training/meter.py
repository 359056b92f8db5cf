"""Speed, loss and time left of a run in progress."""

from __future__ import annotations

import time

from sdlora.training.plan import Plan
from sdlora.training.progress import duration

_MEMORY = 0.98
"""Weight of the past in the running mean of the loss: about the last fifty steps."""


class Meter:
    """Measures a run.

    Args:
        plan: its length.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._mark = time.monotonic()
        self._seconds, self._samples, self._steps = 0.0, 0, 0
        self._sum, self._weight = 0.0, 0.0

    def add(self, loss: float, samples: int) -> None:
        """Counts a step of `samples` pictures."""
        now = time.monotonic()
        self._seconds += now - self._mark
        self._mark = now
        self._samples += samples
        self._steps += 1
        if loss == loss:  # not NaN
            self._sum = _MEMORY * self._sum + (1 - _MEMORY) * loss
            self._weight = _MEMORY * self._weight + (1 - _MEMORY)

    def skip_pause(self) -> None:
        """Leaves the time since the last step, spent on saving and samples, out of the speed."""
        self._mark = time.monotonic()

    @property
    def images_per_second(self) -> float:
        """Pictures trained on per second of training."""
        return self._samples / self._seconds if self._seconds else 0.0

    @property
    def mean_loss(self) -> float:
        """Running mean of the loss, free of the start's bias."""
        return self._sum / self._weight if self._weight else float("nan")

    def note(self, step: int, learning_rate: float, seconds_per_sampling: float) -> str:
        """Describes the state after `step` steps in a few words.

        Args:
            step: steps done.
            learning_rate: the present one.
            seconds_per_sampling: how long a round of samples takes; counted into the time left.
        """
        ahead = range(step, self.plan.total_steps)
        rounds = sum(self.plan.samples_after(s) for s in ahead if self.plan.ends_epoch(s))
        left = len(ahead) * self._seconds / max(self._steps, 1) + rounds * seconds_per_sampling
        return (
            f"loss {self.mean_loss:.4f}, lr {learning_rate:.1e}, {self.images_per_second:.1f} images/s, "
            f"{duration(left)} left"
        )
