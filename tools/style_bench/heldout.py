"""The denoising loss on pictures that nobody learned from: how well a model expects the style, with nothing drawn.

Every picture is noised at the same few levels with the same noise and its mirror image, whatever model is measured, so
that differences between models are hardly blurred by chance.

Legend: V pictures, C latent channels, h w latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdlora.config import TrainSection
from sdlora.data.dataset import Dataset, Sample
from sdlora.diffusion.noise import generator
from sdlora.families import Parts
from sdlora.training.step import Draw, sample_losses

LEVELS = 8
"""Timesteps at which each picture is measured: the middles of equal parts of the schedule."""
WEIGHTS = TrainSection(min_snr_gamma=5.0)
"""How levels are weighted; fixed, so that configurations with other weights can be compared."""


def timesteps(count: int) -> list[int]:
    """Returns the middles of `LEVELS` equal parts of a schedule of `count` timesteps.

    Source: training draws timesteps uniformly, so these are quantiles of its density (stratified sampling).
    """
    return [int((i + 0.5) * count / LEVELS) for i in range(LEVELS)]


@torch.no_grad()
def heldout_losses(parts: Parts, dataset: Dataset, captions: list[str], clip_skip: int) -> list[float]:
    """Returns the mean loss of each picture over 8 levels and 2 antithetic noises, V numbers.

    Args:
        parts: the model, with whatever was learned in it.
        dataset: the V pictures; the centre of each latent distribution is taken.
        captions: what the model is told of each.
        clip_skip: as in training.

    Source: antithetic variates, Hammersley and Morton 1956.
    """
    for component in parts.components.values():
        component.eval()
    levels = timesteps(len(parts.schedule))
    losses = []
    for i, (example, caption) in enumerate(zip(dataset.examples, captions, strict=True)):
        mean = dataset.load([Sample(i, 0)]).mean
        drawn = _noised(mean, levels, example.digest)
        conditioning = parts.family.encode_prompts(parts, [caption], clip_skip)
        repeated = {name: value.repeat_interleave(2 * len(levels), 0) for name, value in conditioning.items()}
        losses.append(sample_losses(parts, drawn, repeated, WEIGHTS).mean().item())
    return losses


def _noised(mean: Tensor, levels: list[int], digest: str) -> Draw:
    """Returns one picture, (1, C, h, w), at every level with a noise of its own and with its opposite."""
    noise = torch.stack([torch.randn(mean.shape[1:], generator=generator("held out", digest, t)) for t in levels])
    latents = mean.expand(2 * len(levels), *mean.shape[1:])
    return Draw(latents, torch.cat([noise, -noise]), torch.tensor(levels * 2))
