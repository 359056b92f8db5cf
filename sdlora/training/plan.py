"""How long a run takes, decided from the settings and the number of pictures before anything heavy is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sdlora.config import Config

LOOKS = 100
"""How often each picture is seen if neither steps nor epochs are given. Style trainers converge on 60 to 100."""
MAX_SAMPLES = 12_000
"""Upper end of the derived length, in pictures seen: large sets need fewer looks at each."""
MAX_EVENTS = 10
"""How often a run draws samples and saves, if not said otherwise."""


@dataclass(frozen=True)
class Plan:
    """The resolved length of a run.

    Attributes:
        num_pictures: distinct pictures.
        samples_per_epoch: pictures seen in an epoch, repeats counted.
        steps_per_epoch: optimizer steps in an epoch.
        total_steps: optimizer steps in the run.
        num_epochs: epochs begun in the run.
        batch_size: pictures per batch, over all processes.
        accumulation: batches per step.
        warmup_steps: steps in which the learning rate climbs.
        sample_every: epochs between samples; 0 means none.
        save_every: epochs between saved LoRA files.
        processes: how many share every batch.
    """

    num_pictures: int
    samples_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    num_epochs: int
    batch_size: int
    accumulation: int
    warmup_steps: int
    sample_every: int
    save_every: int
    processes: int = 1

    @property
    def share(self) -> int:
        """Pictures of a batch that fall to each process."""
        return self.batch_size // self.processes

    def sentence(self) -> str:
        """Says the plan in one sentence, for the person at the terminal."""
        epochs = self.total_steps / self.steps_per_epoch
        epochs = round(epochs, 1) if epochs >= 1 else float(f"{epochs:.1g}")
        looks = self.total_steps * self.samples_per_epoch / self.steps_per_epoch / self.num_pictures
        often = f"about {looks:.0f} times" if looks >= 1.5 else "about once" if looks > 0.5 else "at most once"
        batch = f"batches of {self.batch_size}"
        if self.processes > 1:
            batch += f" ({self.share} in each of {self.processes} processes)"
        if self.accumulation > 1:
            batch += f", {self.accumulation} to a step"
        events = f"a LoRA file {self._every(self.save_every)}"
        if self.sample_every:
            events = f"samples {self._every(self.sample_every)}, " + events
        return (
            f"Plan: {_count(self.total_steps, 'step')} over {_count(self.num_pictures, 'picture')} in {batch}: "
            f"{epochs:g} epoch{'s' * (epochs != 1)} of {_count(self.steps_per_epoch, 'step')}, "
            f"each picture {often}; {events}."
        )

    def ends_epoch(self, step: int) -> bool:
        """Tells whether the step, counted from 0, is the last of its epoch or of the run."""
        return (step + 1) % self.steps_per_epoch == 0 or step + 1 == self.total_steps

    def samples_after(self, step: int) -> bool:
        """Tells whether samples are drawn after the step, counted from 0."""
        return self._due(step, self.sample_every)

    def saves_after(self, step: int) -> bool:
        """Tells whether a LoRA file and a checkpoint are written after the step, counted from 0."""
        return self._due(step, self.save_every)

    def _every(self, epochs: int) -> str:
        if epochs >= self.num_epochs:
            return "at the end"
        return "every epoch" if epochs == 1 else f"every {epochs} epochs"

    def _due(self, step: int, every: int) -> bool:
        if not every or not self.ends_epoch(step):
            return False
        return step + 1 == self.total_steps or (step + 1) // self.steps_per_epoch % every == 0


def make_plan(config: Config, num_pictures: int, bucket_counts: Iterable[int], processes: int = 1) -> Plan:
    """Resolves the length of a run.

    Args:
        config: the settings.
        num_pictures: distinct usable pictures.
        bucket_counts: pictures in each aspect bucket, repeats counted.
        processes: how many train together, each on batches of `data.batch_size`.
    """
    counts = list(bucket_counts)
    samples = sum(counts)
    batch, accumulation = config.data.batch_size * processes, config.train.accumulation
    batches = sum(math.ceil(count / batch) for count in counts)
    steps_per_epoch = math.ceil(batches / accumulation)
    if config.train.steps:
        total = config.train.steps
    elif config.train.epochs:
        total = config.train.epochs * steps_per_epoch
    else:
        wanted = min(LOOKS * num_pictures, MAX_SAMPLES)
        total = max(1, math.ceil(wanted * steps_per_epoch / samples))
    epochs = math.ceil(total / steps_per_epoch)
    usual = math.ceil(epochs / MAX_EVENTS)
    sample_every = usual if config.samples.sample_every is None else config.samples.sample_every
    return Plan(
        num_pictures=num_pictures,
        samples_per_epoch=samples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        num_epochs=epochs,
        batch_size=batch,
        accumulation=accumulation,
        warmup_steps=int(config.optimizer.warmup * total),
        sample_every=sample_every,
        save_every=config.output.save_every or sample_every or usual,
        processes=processes,
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
