"""A run that is ready to go: what the loop works with, what a checkpoint keeps of it, and how it is taken up again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from sdlora.adapters import Lora
from sdlora.attention.choose import Fastest
from sdlora.config import Config
from sdlora.data.dataset import Dataset
from sdlora.errors import TrainingError
from sdlora.families import Parts
from sdlora.training.accumulate import Piece
from sdlora.training.board import Board
from sdlora.training.checkpoint import Checkpoint, restore_checkpoint, save_checkpoint
from sdlora.training.engine import Engine
from sdlora.training.export import Exporter
from sdlora.training.folder import RunFolder
from sdlora.training.interrupt import StopSignal
from sdlora.training.memory import Ladder
from sdlora.training.plan import Plan
from sdlora.training.previews import Previews
from sdlora.training.progress import Reporter
from sdlora.training.room_on_disk import with_room
from sdlora.training.savings import Rung
from sdlora.training.step import Microbatch
from sdlora.training.texts import Texts
from sdlora.training.world import World

Adapters = dict[str, dict[str, Lora]]
"""Component -> module path -> adapter."""
T = TypeVar("T")


@dataclass
class Session:
    """A run that is ready to go.

    Attributes:
        config: the settings.
        run: the run's folder.
        plan: its length.
        parts: the base model, adapters in place.
        dataset: cached latents and the order of batches.
        texts: captions -> conditioning.
        adapters: what trains.
        engine: computes steps.
        kernels: the attention kernels that were measured to be quickest, or `None` where there is no choice.
        rates: full learning rate of each component.
        base_digest: hash of the base's weights; a resumed run must have the same.
        exporter: writes LoRA files.
        previews: draws samples, or `None`.
        board: writes TensorBoard events, or `None`.
        start: steps done in earlier sessions.
        world: the processes that train together.
        ladder: what memory is saved, and more if it runs out.
        reporter: told when the disk is full.
        slowdown: factor on all learning rates, below 1 after numbers were not finite.
        until: tells whether the user wants to stop, and so not to wait for room on the disk.
    """

    config: Config
    run: RunFolder
    plan: Plan
    parts: Parts
    dataset: Dataset
    texts: Texts
    adapters: Adapters
    engine: Engine
    rates: Mapping[str, float]
    base_digest: str
    exporter: Exporter
    previews: Previews | None
    ladder: Ladder
    kernels: Fastest | None = None
    board: Board | None = None
    start: int = 0
    world: World = field(default_factory=World.single)
    reporter: Reporter = field(default_factory=Reporter)
    slowdown: float = 1.0
    until: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        """Lets recorded steps go when the ladder is climbed: they compute as on the rung before."""

        def changed(rung: Rung) -> None:
            self.engine.graphs = None

        self.ladder.changed = changed

    @property
    def micro_batch(self) -> int:
        """Pictures computed at once."""
        return self.ladder.rung.micro_batch

    def microbatch(self, step: int, piece: Piece) -> Microbatch:
        """Returns what the engine is told of some pictures of a step."""
        batch = self.dataset.load(piece.samples)
        texts = self.texts(batch.examples, step, piece.positions)
        sizes = self.parts.family.condition_sizes(batch.sizes)
        return Microbatch(batch.mean, batch.std, texts | sizes, step, piece.positions)

    def facts(self) -> dict[str, str]:
        """Returns what all processes must have in common before the first step."""
        return {
            "pictures or captions": digest(self.dataset),
            "base": self.base_digest,
            "precision": self.exporter.precision,
            "steps done": str(self.start),
            "settings": str((self.plan, self.config.lora, self.config.train, self.config.optimizer)),
            "version of torch": torch.__version__,
        }

    def listen_to(self, stop: StopSignal) -> None:
        """Lets samples, and the waiting for room on the disk, end when the user wants to stop."""
        self.until = lambda: stop.requested
        if self.previews:
            self.previews.stopped = self.until

    def write(self, write: Callable[[], T]) -> T:
        """Writes something, and if the disk is full makes room or waits for it; see `with_room`."""
        return with_room(write, self.run, self.reporter, self.until)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Records the numbers of a step."""
        if self.world.is_first:
            self.write(lambda: self.run.log(entry))
        if self.board:
            self.board.write(entry)

    def save(self, step: int) -> None:
        """Writes a checkpoint; the first process does, for all."""
        if not self.world.is_first:
            return
        facts = {
            "dataset": digest(self.dataset),
            "base": self.base_digest,
            "precision": self.exporter.precision,
            "session": self.exporter.session,
            "started": self.exporter.started,
            "total_steps": self.plan.total_steps,
            "batch_size": self.plan.batch_size,
            "memory": self.ladder.facts(),
            "scaler": self.engine.state(),
            "slowdown": self.slowdown,
            "attention": self.kernels.choices() if self.kernels else {},
        }
        keep = self.config.output.keep_checkpoints
        self.write(
            lambda: save_checkpoint(self.run.checkpoints, step, self.adapters, self.engine.optimizer, facts, keep=keep)
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes the values of a checkpoint.

        Raises:
            TrainingError: if the pictures, captions, base or precision are not those of the run.
        """
        facts = checkpoint.facts
        if facts.get("dataset") != digest(self.dataset):
            raise TrainingError(
                f"the pictures or captions in {self.config.data.images}, or their names, are not those that the run "
                "was started with; put them back, or start a new run"
            )
        if facts.get("precision") != self.exporter.precision:
            raise TrainingError(
                f"the run was started in {facts.get('precision')} and would go on in {self.exporter.precision}; "
                f"give --precision {facts.get('precision')}, or start a new run"
            )
        if facts.get("base") != self.base_digest:
            raise TrainingError(
                f"the base {self.parts.name} is not the one that the run was started with: its weights differ; "
                "put the old one back, or start a new run"
            )
        self.exporter.session, self.exporter.started = facts["session"], facts["started"]
        restore_checkpoint(checkpoint, self.adapters, self.engine.optimizer)
        self.engine.restore(facts.get("scaler"))
        self.slowdown = facts.get("slowdown", 1.0)
        if self.kernels:
            self.kernels.restore(facts.get("attention", {}))
        self.start = checkpoint.step
        if self.world.is_first:
            self.run.forget_after(self.start)


def digest(dataset: Dataset) -> str:
    """Returns a hash of the pictures, captions and repeats that a run trains on."""
    rows = [f"{e.digest} {e.repeats} {e.caption}" for e in dataset.examples]  # their order decides that of the batches
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
