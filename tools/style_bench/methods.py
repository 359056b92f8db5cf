"""The ways to get pictures of a style that the bench compares: what each learns, and what it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from sdlora.data.captions import compose_for
from sdlora.data.dataset import Dataset
from sdlora.diffusion.noise import generator
from sdlora.families import Parts, load_parts
from sdlora.files.attach import attach
from sdlora.files.kohya import read_lora
from sdlora.training.device import choose_device, choose_threads
from sdlora.training.progress import Reporter
from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.sources import BASE_STYLES, STYLE_OF
from tools.style_bench.experiment import Experiment
from tools.style_bench.heldout import heldout_losses
from tools.style_bench.protocol import Task
from tools.style_bench.references import Tuning, open_pictures, tune
from tools.style_bench.runs import train_lora, write_folder

LORA_FILE = "lora.safetensors"
DENOISER_FILE = "denoiser.safetensors"

Learn = Callable[[Experiment, Task, Path, Reporter], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One row of the report.

    Attributes:
        id: name on the command line and in files.
        title: name in the report.
        texts: the prompts, one for each concept of the task.
        learns: which pictures, or `None`: the base is used as it is.
        learn: writes what was learned into a folder and returns facts for the report.
        facts: what the result depends on besides the pictures; part of a cell's key.
        per_subset: whether every subset has a cell of its own.
        per_style: whether every held-out style has one; if not, styles with the same prompts share it.
        styles: the styles asked for, one for each prompt; their real pictures are not in the concept gallery.
    """

    id: str
    title: str
    texts: Callable[[Experiment, Task], list[str]]
    styles: Callable[[Task], list[str]]
    learns: Callable[[Task], Sequence[Concept]] | None = None
    learn: Learn | None = None
    facts: Callable[[Experiment], Any] = lambda experiment: None
    per_subset: bool = False
    per_style: bool = True


def load(experiment: Experiment, folder: Path | None = None, strength: float = 1.0) -> Parts:
    """Loads the base in fp32, with what a method has left in `folder`, a LoRA at the given strength."""
    parts = load_parts(experiment.base, prediction=experiment.config.base.prediction)
    parts = parts.to(choose_device(), torch.float32)
    choose_threads(parts, experiment.config.train.threads)
    for component in parts.components.values():
        component.requires_grad_(False).eval()
    if folder and (folder / LORA_FILE).is_file():
        attach(parts, read_lora(folder / LORA_FILE), strength)
    if folder and (folder / DENOISER_FILE).is_file():
        parts.denoiser.load_state_dict(load_file(folder / DENOISER_FILE))
    return parts


def with_trigger(experiment: Experiment, text: str) -> str:
    """Returns a label as captions are composed in training, trigger word and all."""
    return compose_for(experiment.config.data, text, rng=generator("bench"))


def measure_heldout(experiment: Experiment, parts: Parts, dataset: Dataset) -> list[float]:
    """Returns the held-out loss of each validation picture, told with the trigger word."""
    captions = [with_trigger(experiment, example.caption) for example in dataset.examples]
    return heldout_losses(parts, dataset, captions, experiment.config.base.clip_skip)


def open_validation(experiment: Experiment, task: Task, parts: Parts) -> Dataset:
    """Encodes the validation pictures of a task."""
    with TemporaryDirectory() as scratch:
        folder = write_folder(Path(scratch) / "images", experiment.pictures, task.style.id, task.validation)
        return open_pictures(parts, folder, experiment.plain_config)


def _trained_texts(experiment: Experiment, task: Task) -> list[str]:
    return [with_trigger(experiment, concept.label) for concept in task.prompts]


def _named_texts(experiment: Experiment, task: Task) -> list[str]:
    return [f"{concept.label}, {task.style.words} style" for concept in task.prompts]


def _own_styles(task: Task) -> list[str]:
    return [BASE_STYLES[i % len(BASE_STYLES)] for i in range(len(task.prompts))]


def _own_texts(experiment: Experiment, task: Task) -> list[str]:
    styles = [STYLE_OF[style] for style in _own_styles(task)]
    return [f"{concept.label}, {style.words} style" for concept, style in zip(task.prompts, styles, strict=True)]


def _target_style(task: Task) -> list[str]:
    return [task.style.id] * len(task.prompts)


def _learn_lora(experiment: Experiment, task: Task, folder: Path, reporter: Reporter) -> dict[str, Any]:
    target = folder / LORA_FILE
    return train_lora(experiment.config, experiment.pictures, task.style.id, task.learn, target, reporter)


def _tuned(learns: Callable[[Task], Sequence[Concept]], tuning: Callable[[Experiment], Tuning]) -> Learn:
    def learn(experiment: Experiment, task: Task, folder: Path, reporter: Reporter) -> dict[str, Any]:
        parts = load(experiment)
        with TemporaryDirectory(dir=folder) as scratch:
            style, concepts = task.style.id, learns(task)
            images = write_folder(Path(scratch) / "images", experiment.pictures, style, concepts)
            dataset = open_pictures(parts, images, experiment.plain_config)
        target = folder / DENOISER_FILE
        return tune(parts, dataset, experiment.plain_config, tuning(experiment), target, reporter)

    return learn


def _tuning_facts(tuning: Callable[[Experiment], Tuning]) -> Callable[[Experiment], Any]:
    return lambda experiment: [asdict(tuning(experiment)), experiment.plain_config.data.model_dump(mode="json")]


METHODS: dict[str, Method] = {
    method.id: method
    for method in (
        Method(
            "lora",
            "LoRA",
            _trained_texts,
            _target_style,
            learns=lambda task: task.learn,
            learn=_learn_lora,
            facts=lambda experiment: experiment.learning_settings(),
            per_subset=True,
        ),
        Method("base", "base alone", _trained_texts, _target_style),
        Method("words", "base, style named", _named_texts, _target_style),
        Method("own", "base, own styles", _own_texts, _own_styles, per_style=False),
        Method(
            "full",
            "full, same pictures",
            _trained_texts,
            _target_style,
            learns=lambda task: task.learn,
            learn=_tuned(lambda task: task.learn, lambda experiment: experiment.full),
            facts=_tuning_facts(lambda experiment: experiment.full),
            per_subset=True,
        ),
        Method(
            "oracle",
            "full, all pictures",
            _trained_texts,
            _target_style,
            learns=lambda task: task.everything,
            learn=_tuned(lambda task: task.everything, lambda experiment: experiment.oracle),
            facts=_tuning_facts(lambda experiment: experiment.oracle),
        ),
    )
}
"""In the order of the report's rows. "own" is no rival: retention and diversity are measured against it."""
