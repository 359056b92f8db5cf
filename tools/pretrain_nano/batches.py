"""What is trained in step n: a function of (seed, n), so that a run can be taken up at any step."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sdlora.diffusion.noise import generator
from sdlora.diffusion.schedule import Schedule
from tools.pretrain_nano.captions import caption
from tools.pretrain_nano.latents import Latents
from tools.pretrain_nano.sources import STYLE_OF

STAIN = 0.3
"""Greatest deviation of a stain, in latents."""
GRIDS = (2, 4, 8)
"""Stains have the size of half a picture, of a quarter or of an eighth."""
TWICE = ("twemoji", "fluent-flat")
"""Styles whose pictures come twice in a round: those that the base draws worst, measured by what the VAE can do."""
FILL = 5.0
"""How much an error in a fill counts, one elsewhere counting 1."""


@dataclass(frozen=True)
class Batch:
    """One step's material.

    Attributes:
        latents: (B, 4, 16, 16) fp32.
        captions: B sentences.
        noise: (B, 4, 16, 16), `stains` among it.
        timesteps: (B,), spread evenly over the schedule.
        weights: (B, 16, 16), how much an error counts in each place.
    """

    latents: Tensor
    captions: list[str]
    noise: Tensor
    timesteps: Tensor
    weights: Tensor


def batch(data: Latents, step: int, size: int, seed: int, schedule: Schedule) -> Batch:
    """Returns the batch of a step. Every picture comes once in a round, or twice, in an order of that round.

    Timesteps are stratified: the range is cut into `size` equal parts and each part gives one, so that no step sees
    only easy or only hard noise. Source: Kingma et al. 2021, arXiv:2107.00630, section I.1 (low-discrepancy sampler).
    """
    deck = [row for row, style in enumerate(data.styles) for _ in range(2 if style in TWICE else 1)]
    rows, chances = [], []
    for position in range(step * size, (step + 1) * size):
        turn, place = divmod(position, len(deck))
        rows.append(deck[_order(len(deck), turn, seed)[place]])
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
    timesteps = (parts * len(schedule)).long()[torch.randperm(size, generator=rng)].clamp(max=len(schedule) - 1)
    noise += stains(schedule.snr(timesteps).rsqrt(), latents.shape, rng)
    weights = 1 + (FILL - 1) * data.fills[rows, views].float()
    return Batch(latents, captions, noise, timesteps, weights)


def stains(spread: Tensor, shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Returns smooth noise that half of the samples get on top of the white noise.

    White noise hardly changes the mean over a fill, so the denoiser learns to believe the colours that it sees; when it
    draws, they are its own, and what is wrong in them stays. Stains make it learn which colours there should be. Above
    some noise they are no longer worth mentioning beside it.

    Args:
        spread: deviation of each sample's noise, measured in latents, (B,).
        shape: (B, C, h, w).
        rng: source of randomness.

    Returns:
        (B, C, h, w), in units of the noise: at most its own deviation, and at most `STAIN` in latents.

    Source: smooth noise of several sizes, Whitaker 2023, "Multi-resolution noise"; a disturbed input against errors of
    one's own, Ning et al. 2023, arXiv:2301.11706. Here the target counts it as noise, so the clean picture stays it.
    """
    size, channels, height, width = shape
    kinds = []
    for grid in GRIDS:
        coarse = torch.randn(size, channels, grid, grid, generator=rng)
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
        kinds.append(smooth / smooth.std())
    chosen = torch.randint(len(GRIDS), (size,), generator=rng)
    strength = (2 * torch.rand(size, generator=rng) - 1).clamp(min=0) * (STAIN / spread).clamp(max=1)
    return torch.stack(kinds)[chosen, torch.arange(size)] * strength[:, None, None, None]


_orders: dict[tuple[int, int, int], Tensor] = {}


def _order(length: int, turn: int, seed: int) -> Tensor:
    key = (length, turn, seed)
    if key not in _orders:
        _orders.clear()
        _orders[key] = torch.randperm(length, generator=generator(seed, "order", turn))
    return _orders[key]
