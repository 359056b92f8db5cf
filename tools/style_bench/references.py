"""What a LoRA is measured against: the same pictures, or all of the style, taught to every weight of the denoiser.

Legend: B batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdlora.atomic import replacing
from sdlora.config import Config, TrainSection
from sdlora.data.cache import Cache
from sdlora.data.dataset import Dataset, prepare
from sdlora.data.folder import scan
from sdlora.diffusion.noise import generator
from sdlora.errors import TrainingError
from sdlora.families import Parts
from sdlora.training.lr import learning_rate_factor
from sdlora.training.progress import Reporter
from sdlora.training.step import draw, sample_losses
from sdlora.training.texts import Texts

WARMUP = 0.05
"""Share of the steps in which the learning rate climbs; afterwards it falls along a cosine."""
SETTINGS = TrainSection()
"""Seed, loss weights and longest gradient: sdlora's defaults, whatever the LoRA was trained with."""


@dataclass(frozen=True)
class Tuning:
    """How all weights are trained.

    Attributes:
        steps: optimizer steps.
        rate: the highest learning rate.
        batch_size: pictures per step.
    """

    steps: int
    rate: float
    batch_size: int


FULL = Tuning(steps=400, rate=3e-4, batch_size=4)
"""On the LoRA's own pictures: each is seen about 50 times.

Source: joint success on the half "tune", see BENCH.md, "What full fine-tuning learns".
"""
ORACLE = Tuning(steps=1000, rate=3e-4, batch_size=8)
"""On all of the style, 600 to 1000 pictures: each is seen about 8 to 13 times."""


def open_pictures(parts: Parts, folder: Path, config: Config) -> Dataset:
    """Encodes a folder of pictures as `sdlora train` would; latents come from, and go to, the user's cache."""
    cache = Cache(config.data.cache_dir)
    found = scan(folder, config.data.trigger, config.data.background, cache=cache)
    return prepare(parts, found, config.data, SETTINGS.seed, cache)


def tune(
    parts: Parts, dataset: Dataset, config: Config, tuning: Tuning, target: Path, reporter: Reporter
) -> dict[str, Any]:
    """Trains all weights of the denoiser, and writes it.

    Args:
        parts: the base; its denoiser is trained in place.
        dataset: the pictures to learn from.
        config: how captions are composed; nothing else of it counts.
        tuning: steps, learning rate, batch size.
        target: safetensors file of the denoiser's state dict, fp32.
        reporter: told about the progress.

    Returns:
        Facts for the report: seconds of training, and `tuning`.

    Raises:
        TrainingError: if a loss is not finite.
    """
    texts = Texts(parts, config, Cache(config.data.cache_dir), tuning.steps)
    began = time.monotonic()
    _train(parts, dataset, texts, tuning, reporter)
    seconds = time.monotonic() - began
    state = {name: value.detach().cpu().contiguous() for name, value in parts.denoiser.state_dict().items()}
    with replacing(target) as temporary:
        save_file(state, temporary)
    return {"seconds": round(seconds, 1), **asdict(tuning)}


def _train(parts: Parts, dataset: Dataset, texts: Texts, tuning: Tuning, reporter: Reporter) -> None:
    parts.denoiser.requires_grad_(True).train()
    weights, rate = list(parts.denoiser.parameters()), tuning.rate
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    torch.manual_seed(generator(SETTINGS.seed, "full").initial_seed())
    reporter.begin(f"full fine-tuning at {rate:g}", tuning.steps)
    for step in range(tuning.steps):
        factor = learning_rate_factor(
            step, total_steps=tuning.steps, warmup_steps=int(WARMUP * tuning.steps), schedule="cosine"
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        loss = _loss(parts, dataset, texts, tuning, step)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingError(f"full fine-tuning at {rate:g} broke down at step {step + 1}; give a lower rate")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, SETTINGS.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        reporter.advance(f"loss {value:.3f}")
    reporter.end()
    parts.denoiser.requires_grad_(False).eval()


def _loss(parts: Parts, dataset: Dataset, texts: Texts, tuning: Tuning, step: int) -> Tensor:
    """Returns the mean loss of one step's batch, with its graph."""
    epoch, index = divmod(step, dataset.steps_per_epoch(tuning.batch_size))
    batch = dataset.load(dataset.batches(epoch, tuning.batch_size)[index])
    positions = range(len(batch.examples))
    drawn = draw(
        batch.mean,
        batch.std,
        num_timesteps=len(parts.schedule),
        seed=SETTINGS.seed,
        step=step,
        positions=positions,
        noise_offset=SETTINGS.noise_offset,
    )
    conditioning = {k: v.to(parts.device) for k, v in texts(batch.examples, step, positions).items()}
    return sample_losses(parts, drawn, conditioning, SETTINGS).mean()
