"""Optimizers by name, and the learning rates they start from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sdlora.config import Config, OptimizerSection
from sdlora.families import Parts

BASE_LEARNING_RATE = 1e-4
"""At the width of Stable Diffusion 1.5, for rank = alpha; the usual value of its LoRA trainers."""


def adamw(groups: list[dict[str, Any]], settings: OptimizerSection) -> torch.optim.Optimizer:
    """Builds AdamW. Source: Loshchilov and Hutter 2019, arXiv:1711.05101.

    Fused: one kernel over all of the few hundred small tensors; on the CPU 6 ms instead of 20 ms for 256 of them.
    """
    return torch.optim.AdamW(
        groups, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay, fused=True
    )


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerSection], torch.optim.Optimizer]] = {"adamw": adamw}


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
    adapters: Mapping[str, Iterable[nn.Module]], rates: Mapping[str, float], settings: OptimizerSection
) -> torch.optim.Optimizer:
    """Builds the optimizer over the adapters' own parameters, one group per component.

    Each group remembers its full learning rate as `base_lr` and whose parameters it holds as `component`.
    """
    groups = [
        {
            "params": [p for adapter in modules for p in adapter.parameters() if p.requires_grad],
            "lr": rates[component],
            "base_lr": rates[component],
            "component": component,
        }
        for component, modules in adapters.items()
    ]
    return OPTIMIZERS[settings.optimizer](groups, settings)
