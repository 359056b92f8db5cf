"""A run that is ready to go: what the loop works with, what a checkpoint keeps of it, and how it is taken up again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from sdlora.adapters import Lora
from sdlora.config import Config
from sdlora.data.dataset import Dataset
from sdlora.errors import TrainingError
from sdlora.families import Parts
from sdlora.training.board import Board
from sdlora.training.checkpoint import Checkpoint, restore_checkpoint, save_checkpoint
from sdlora.training.export import Exporter
from sdlora.training.folder import RunFolder
from sdlora.training.plan import Plan
from sdlora.training.previews import Previews
from sdlora.training.texts import Texts

Adapters = dict[str, dict[str, Lora]]
"""Component -> module path -> adapter."""


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
        trainable: its parameters.
        optimizer: accelerate's wrapper, which knows the loss scale.
        accelerator: precision and backward.
        rates: full learning rate of each component.
        base_digest: hash of the base's weights; a resumed run must have the same.
        exporter: writes LoRA files.
        previews: draws samples, or `None`.
        board: writes TensorBoard events, or `None`.
        start: steps done in earlier sessions.
    """

    config: Config
    run: RunFolder
    plan: Plan
    parts: Parts
    dataset: Dataset
    texts: Texts
    adapters: Adapters
    trainable: list[nn.Parameter]
    optimizer: Any
    accelerator: Accelerator
    rates: Mapping[str, float]
    base_digest: str
    exporter: Exporter
    previews: Previews | None
    board: Board | None = None
    start: int = 0

    def log(self, entry: Mapping[str, Any]) -> None:
        """Records the numbers of a step."""
        self.run.log(entry)
        if self.board:
            self.board.write(entry)

    def save(self, step: int) -> None:
        """Writes a checkpoint."""
        scaler = self.accelerator.scaler
        facts = {
            "dataset": digest(self.dataset),
            "base": self.base_digest,
            "precision": self.exporter.precision,
            "session": self.exporter.session,
            "started": self.exporter.started,
            "total_steps": self.plan.total_steps,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        save_checkpoint(
            self.run.checkpoints,
            step,
            self.adapters,
            self.optimizer.optimizer,
            facts,
            keep=self.config.output.keep_checkpoints,
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
        restore_checkpoint(checkpoint, self.adapters, self.optimizer.optimizer)
        if self.accelerator.scaler is not None and facts.get("scaler"):
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.start = checkpoint.step
        self.run.forget_after(self.start)


def digest(dataset: Dataset) -> str:
    """Returns a hash of the pictures, captions and repeats that a run trains on."""
    rows = [f"{e.digest} {e.repeats} {e.caption}" for e in dataset.examples]  # their order decides that of the batches
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()
