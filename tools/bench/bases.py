"""The base models that both sides train: real shapes, random weights, or the embedded nano with its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from sdlora.diffusion.noise import generator
from sdlora.diffusion.schedule import Schedule
from sdlora.families import Parts, load_parts, resolve_base
from sdlora.training.device import DTYPES
from tools.bench.rows import NANO, Row

BIAS_SPREAD = 0.02


def load_base(row: Row, device: torch.device) -> Parts:
    """Returns the base of a row in its precision, on a device.

    A base with random weights has no VAE and no text encoders: latents and text states are given.
    """
    dtype = DTYPES[row.precision]
    if row.base == NANO:
        return load_parts(resolve_base(NANO)).to(device, dtype)
    denoiser: Any = empty_denoiser(row.family.denoiser_config)
    denoiser.to(dtype).to_empty(device=device)
    randomise(denoiser)
    return _without_encoders(row, denoiser, device)


def hollow_base(row: Row) -> Parts:
    """Returns the base of a row on the meta device: shapes without memory."""
    config: Any = row.family.denoiser_config
    if row.base == NANO:
        config = UNet2DConditionModel.load_config(str(resolve_base(NANO).path / "unet"))
    return _without_encoders(row, empty_denoiser(config), torch.device("cpu"))


def _without_encoders(row: Row, denoiser: nn.Module, device: torch.device) -> Parts:
    family = row.family
    return Parts(
        family=family,
        name=f"random {family.name}",
        denoiser=denoiser,
        vae=nn.Identity(),
        text_encoders={},
        tokenizers={},
        schedule=Schedule.from_config(family.scheduler_config).to(device),
        scheduler_config=dict(family.scheduler_config),
        resolution=row.side,
    )


def empty_denoiser(config: Mapping[str, Any]) -> UNet2DConditionModel:
    """Builds a denoiser on the meta device."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@torch.no_grad()
def randomise(denoiser: nn.Module) -> None:
    """Gives every weight values that are a function of its name alone, drawn where and in which format it lies.

    Matrices and kernels are normal with variance 1 / fan-in, so that signals and attention keep a natural size; norms
    are the identity, biases small.
    """
    for name, weight in denoiser.named_parameters():
        rng = torch.Generator(weight.device).manual_seed(generator("bench", name).initial_seed())
        if weight.ndim > 1:
            weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=rng)
        elif name.endswith("weight"):
            weight.fill_(1)
        else:
            weight.normal_(0, BIAS_SPREAD, generator=rng)
