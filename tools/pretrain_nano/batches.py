"""What is trained in step n: a function of (seed, n), so that a run can be taken up at any step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.diffusion.noise import generator
from tools.pretrain_nano.captions import caption
from tools.pretrain_nano.latents import Latents
from tools.pretrain_nano.sources import STYLE_OF


@dataclass(frozen=True)
class Batch:
    """One step's material.

    Attributes:
        latents: (B, 4, 16, 16) fp32.
        captions: B sentences.
        noise: (B, 4, 16, 16).
        timesteps: (B,), spread evenly over the schedule.
    """

    latents: Tensor
    captions: list[str]
    noise: Tensor
    timesteps: Tensor


def batch(data: Latents, step: int, size: int, seed: int, num_timesteps: int = 1000) -> Batch:
    """Returns the batch of a step. Every picture comes once per epoch, in an order of that epoch.

    Timesteps are stratified: the range is cut into `size` equal parts and each part gives one, so that no step sees
    only easy or only hard noise. Source: Kingma et al. 2021, arXiv:2107.00630, section I.1 (low-discrepancy sampler).
    """
    rows, chances = [], []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, len(data))
        rows.append(int(_order(len(data), epoch, seed)[place]))
        chances.append(random.Random(f"{seed} {position}"))
    views = [chance.randrange(data.values.shape[1]) for chance in chances]
    captions = [
        caption(data.concepts[row], STYLE_OF[data.styles[row]], chance)
        for row, chance in zip(rows, chances, strict=True)
    ]
    rng = generator(seed, "batch", step)
    latents = data.values[rows, views].float()
    noise = torch.randn(latents.shape, generator=rng)
    parts = (torch.arange(size) + torch.rand(size, generator=rng)) / size
    timesteps = (parts * num_timesteps).long()[torch.randperm(size, generator=rng)]
    return Batch(latents, captions, noise, timesteps.clamp(max=num_timesteps - 1))


_orders: dict[tuple[int, int, int], Tensor] = {}


def _order(length: int, epoch: int, seed: int) -> Tensor:
    key = (length, epoch, seed)
    if key not in _orders:
        _orders.clear()
        _orders[key] = torch.randperm(length, generator=generator(seed, "order", epoch))
    return _orders[key]
