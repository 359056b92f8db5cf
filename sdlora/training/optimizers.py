"""Optimizers by name, and the learning rates they start from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdlora.adapters import FlatParameters
from sdlora.config import Config, OptimizerSection
from sdlora.families import Parts
from sdlora.training.adamw8bit import BLOCK, AdamW8bit

BASE_LEARNING_RATE = 1e-4
"""At the width of Stable Diffusion 1.5, for rank = alpha; the usual value of its LoRA trainers."""


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, fused: one kernel for everything, which can also skip a step without asking.

    torch's own wrapper around a step loads its compiler, 0.5 s, to tell it where not to look; this one does not.
    """

    _plain_step = staticmethod(inspect.unwrap(torch.optim.Adam.step))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Steps every parameter that has a gradient."""
        self._plain_step(self)


def adamw(groups: list[dict[str, Any]], settings: OptimizerSection) -> torch.optim.Optimizer:
    """Builds AdamW. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""
    return FusedAdamW(groups, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay, fused=True)


def adamw8bit(groups: list[dict[str, Any]], settings: OptimizerSection) -> torch.optim.Optimizer:
    """Builds AdamW with moments of 8 bits."""
    return AdamW8bit(groups, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerSection], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw8bit": adamw8bit,
}

MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / BLOCK}
"""What the optimizer keeps of each number that trains."""


def resolve_learning_rates(config: Config, parts: Parts) -> dict[str, float]:
    """Returns the learning rate of each component that trains.

    The default falls with the width of the denoiser: Adam's step moves a layer's output in proportion to its number of
    inputs, so a network a tenth as wide takes ten times the rate.

    Source: Yang et al. 2022, arXiv:2203.03466, table 8 (Adam learning rate of hidden weights ~ 1 / fan-in).
    """
    given = config.optimizer.learning_rate
    denoiser: Any = parts.denoiser
    width = max(denoiser.config["block_out_channels"])
    rate: float = given if given is not None else BASE_LEARNING_RATE * parts.family.denoiser_width / width
    rates = {"denoiser": rate}
    if config.lora.text_encoder:
        encoder_rate = config.optimizer.text_encoder_learning_rate or rate / 2
        rates |= dict.fromkeys(parts.text_encoders, encoder_rate)
    return rates


def make_optimizer(
    flat: FlatParameters, rates: Mapping[str, float], settings: OptimizerSection
) -> torch.optim.Optimizer:
    """Builds the optimizer over the adapters' factors, one group per component.

    Each group remembers its full learning rate as `base_lr` and whose parameters it holds as `component`.
    """
    groups = [
        {"params": [part], "lr": rates[component], "base_lr": rates[component], "component": component}
        for component, part in flat.parts.items()
    ]
    return OPTIMIZERS[settings.optimizer](groups, settings)
