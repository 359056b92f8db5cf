"""What both sides are given: the same cached batches and the same LoRA factors, functions of fixed keys.

Legend: B batch, C latent channels, h w latent size, L tokens, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.adapters import find_layers
from sdlora.adapters.lora import factor_shapes
from sdlora.diffusion.noise import generator
from sdlora.families import Conditioning, Parts
from sdlora.training.step import Draw, draw
from tools.bench.rows import RANK, TARGETS, Row

TOKENS = 77
SIZE_NUMBERS = 6
"""SDXL's: height and width of the picture, top and left of the crop, height and width of the target."""
UP_SPREAD = 0.02
"""Of the factors `up`: large enough that every gradient is far from zero, small beside the base's weights."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module path -> (down, up), fp32."""


@dataclass(frozen=True)
class Inputs:
    """One batch, on the device.

    Attributes:
        drawn: latents, noise and timesteps; the first two fp32 with values that bf16 holds exactly, so that sides which
            round them have the same target as sides which do not.
        conditioning: text states in the base's dtype, sizes in fp32.
    """

    drawn: Draw
    conditioning: Conditioning

    def to(self, dtype: torch.dtype) -> Inputs:
        """Returns the batch with its text in another format."""
        sizes = {name: tensor for name, tensor in self.conditioning.items() if name == "sizes"}
        return Inputs(self.drawn, {name: tensor.to(dtype) for name, tensor in self.conditioning.items()} | sizes)


def make_inputs(row: Row, parts: Parts, count: int) -> list[Inputs]:
    """Makes several batches of a row; each is a function of the row's shape and its own number."""
    return [_one(row, parts, number) for number in range(count)]


def _one(row: Row, parts: Parts, number: int) -> Inputs:
    denoiser: Any = parts.denoiser
    side = row.side // parts.vae_factor
    rng = generator("bench latents", row.side, number)
    mean = torch.randn(row.batch, denoiser.config.in_channels, side, side, generator=rng)
    positions = range(row.batch)
    drawn = draw(
        mean,
        None,
        num_timesteps=len(parts.schedule),
        seed=0,
        step=number,
        positions=positions,
        noise_offset=0.0,
    )
    device = parts.device
    rounded = [tensor.bfloat16().float().to(device) for tensor in (drawn.latents, drawn.noise)]
    conditioning = {
        name: tensor.to(device, torch.float32 if name == "sizes" else parts.dtype)
        for name, tensor in _conditioning(row, denoiser.config, number).items()
    }
    return Inputs(Draw(rounded[0], rounded[1], drawn.t.to(device)), conditioning)


def _conditioning(row: Row, config: Any, number: int) -> Conditioning:
    rng = generator("bench text", number)
    found = {"states": torch.randn(row.batch, TOKENS, config.cross_attention_dim, generator=rng)}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - SIZE_NUMBERS * config.addition_time_embed_dim
        found["pooled"] = torch.randn(row.batch, width, generator=rng)
        found["sizes"] = torch.tensor([[row.side, row.side, 0, 0, row.side, row.side]] * row.batch, dtype=torch.float32)
    return found


def make_factors(parts: Parts, denoiser: nn.Module) -> Factors:
    """Makes the factors of every layer that trains, `up` not zero, each a function of the layer's path.

    Args:
        parts: tells which layers these are.
        denoiser: without adapters.
    """
    factors: Factors = {}
    for path, layer in find_layers(denoiser, parts.family.targets[TARGETS]).items():
        rng = generator("bench factors", path)
        down, up = factor_shapes(layer, RANK)
        factors[path] = (
            torch.randn(down, generator=rng) / math.sqrt(3 * math.prod(down[1:])),
            torch.randn(up, generator=rng) * UP_SPREAD,
        )
    return factors


def gradient(parameter: nn.Parameter) -> Tensor:
    """Returns a copy of a parameter's gradient, fp32, on the CPU."""
    assert parameter.grad is not None
    return parameter.grad.detach().to("cpu", torch.float32, copy=True)
