"""A cell is one method's pictures of one style, learned from one subset: done once, then found by its key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.atomic import replacing
from sdlora.data.cache import Cache
from sdlora.families import Parts
from sdlora.training.progress import Reporter
from tools.pretrain_nano.concepts import Concept
from tools.style_bench import draw as drawing
from tools.style_bench.experiment import Experiment, write_json
from tools.style_bench.methods import DENOISER_FILE, Method, load, measure_heldout, open_validation
from tools.style_bench.protocol import Task, seed_of


@dataclass(frozen=True)
class Cell:
    """One method for one task.

    Attributes:
        experiment: the settings.
        task: style, subset, prompts.
        method: what is done.
        strength: at which a LoRA is used; all cells that differ in nothing else than how it is used share one LoRA.
        cfg: CFG scale with which is drawn.
    """

    experiment: Experiment
    task: Task
    method: Method
    strength: float = 1.0
    cfg: float = drawing.CFG

    @cached_property
    def texts(self) -> list[str]:
        """The prompts, P of them."""
        return self.method.texts(self.experiment, self.task)

    @property
    def trigger_matters(self) -> bool:
        """Whether something was learned that a trigger word calls."""
        return self.method.learn is not None and bool(self.experiment.config.data.trigger)

    @property
    def measures_loss(self) -> bool:
        """Whether the held-out loss is measured: of the base with the learned texts, and of all that learned."""
        return self.method.learn is not None or self.method.id == "base"

    @cached_property
    def key(self) -> str:
        """Hash of everything that the pictures depend on."""
        task, learns = self.task, self.method.learns
        return Cache.key(
            self.experiment.digest,
            self.method.id,
            self.texts,
            [concept.base for concept in task.prompts],
            task.num_seeds,
            drawing.settings(self.cfg),
            _names(learns(task)) if learns else [],
            _names(task.validation) if self.measures_loss else [],
            task.style.id if self.measures_loss else "",
            self.method.facts(self.experiment),
            *([] if self.strength == 1 else [self.strength]),
        )

    @property
    def folder(self) -> Path:
        """Where the cell's files lie."""
        style = f"{self.task.style.id}-" if self.method.per_style else ""
        subset = f"{self.task.subset}-" if self.method.per_subset else ""
        return self.experiment.work / f"{style}{subset}{self.method.id}-{self.key[:12]}"

    @property
    def _school(self) -> Path:
        """Where what was learned lies."""
        return replace(self, strength=1.0, cfg=drawing.CFG).folder

    @property
    def is_drawn(self) -> bool:
        """Whether the pictures are there."""
        return self._pictures.is_file()

    @property
    def _pictures(self) -> Path:
        return self.folder / "pictures.safetensors"

    def read(self) -> dict[str, Tensor]:
        """Returns what was drawn.

        Returns:
            `pictures`: uint8, (P, S, 128, 128, 3). If the method has learned a trigger word, `leak`: uint8, (P, 1, 128,
            128, 3), drawn without it. If measured, `losses`: fp64, one for each validation picture.
        """
        return load_file(self._pictures)

    def facts(self) -> dict[str, Any]:
        """Returns what the method noted while it learned; empty if it learns nothing."""
        file = self._school / "learned.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def run(self, reporter: Reporter) -> None:
        """Learns and draws, unless that is done already; each of the two is kept on its own."""
        if self.is_drawn:
            return
        for folder in (self.folder, self._school):
            folder.mkdir(parents=True, exist_ok=True)
        if self.method.learn and not self.facts():
            facts = self.method.learn(self.experiment, self.task, self._school, reporter)
            write_json(self._school / "learned.json", facts)
        parts = load(self.experiment, self._school, self.strength)
        tensors = self._draw(parts, reporter)
        if self.measures_loss:
            validation = open_validation(self.experiment, self.task, parts)
            losses = measure_heldout(self.experiment, parts, validation)
            tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        with replacing(self._pictures) as temporary:
            save_file(tensors, temporary)
        (self.folder / DENOISER_FILE).unlink(missing_ok=True)  # fifty megabytes each, and of no use any more

    def _draw(self, parts: Parts, reporter: Reporter) -> dict[str, Tensor]:
        task, skip = self.task, self.experiment.config.base.clip_skip
        seeds = [[seed_of(concept.base, k) for k in range(task.num_seeds)] for concept in task.prompts]
        tensors = {"pictures": drawing.draw(parts, self.texts, seeds, skip, reporter, self.cfg)}
        if self.trigger_matters:
            labels = [concept.label for concept in task.prompts]
            tensors["leak"] = drawing.draw(parts, labels, [some[:1] for some in seeds], skip, reporter, self.cfg)
        return tensors


def _names(concepts: Sequence[Concept]) -> list[str]:
    return [concept.code for concept in concepts]
