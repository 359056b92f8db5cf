"""The embedded base with adapters, put together as a run does it, and one optimizer step of it."""

from __future__ import annotations

from typing import Any

import torch

from sdlora.config import Config
from sdlora.config_io import load_config
from sdlora.diffusion.noise import generator
from sdlora.families import Base, Parts, load_parts
from sdlora.families.loading import NANO
from sdlora.training.device import choose_threads
from sdlora.training.precision import choose_precision
from sdlora.training.savings import Rung
from sdlora.training.step import Microbatch
from tools.bench.ours import Ours

BATCH = 2
"""Pictures in a step. Ten pictures of five shapes fill their batches just so."""
DEVICE = torch.device("cpu")
PROMPTS = ("a red teapot", "a blue bicycle in the rain")


def settings(**given: Any) -> Config:
    """Returns the settings of a run on the embedded base with one thread.

    Args:
        **given: `section__key` = value.
    """
    fixed = {"base.model": "nano", "data.batch_size": BATCH, "train.threads": 1}
    return load_config(None, fixed | {name.replace("__", "."): value for name, value in given.items()})


def load_base(config: Config) -> Parts:
    """Loads the embedded base afresh, for adapters change it."""
    precision = choose_precision(config.train.precision, DEVICE)
    parts = load_parts(Base("nano", NANO, "embedded"), config.base, device=DEVICE, dtype=precision.dtype)
    choose_threads(parts, config.train.threads)
    return parts


def build(config: Config, parts: Parts | None = None) -> Ours:
    """Returns a base with adapters, optimizer and engine, ready to step."""
    return Ours(parts or load_base(config), config, Rung(micro_batch=BATCH))


def take_step(trainer: Ours, batch: Microbatch) -> None:
    """Does a whole optimizer step: draws, forward, backward, clip, update."""
    engine = trainer.engine
    engine.begin()
    engine.update(engine.add(batch, 1 / len(batch.positions)))


def square_batch(parts: Parts, side: int) -> Microbatch:
    """Returns a batch of square pictures.

    Args:
        parts: the base, which encodes their captions.
        side: in pixels, a multiple of the VAE's factor.
    """
    denoiser: Any = parts.denoiser
    size = side // parts.vae_factor
    shape = BATCH, denoiser.config.in_channels, size, size
    with torch.no_grad():
        texts = parts.family.encode_prompts(parts, PROMPTS, 1)
    conditioning = {name: x.to(parts.device, parts.dtype) for name, x in texts.items()}
    return Microbatch(torch.randn(shape, generator=generator("growth", side)), None, conditioning, 0, range(BATCH))
