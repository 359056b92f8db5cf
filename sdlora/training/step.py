"""One training step's loss: timestep, noise, prediction, target, weight. No state, no branches on the kind of model.

Legend: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.config import TrainSection
from sdlora.diffusion.counter import WORDS, Philox, below, normal
from sdlora.diffusion.losses import min_snr_weight, squared_error
from sdlora.diffusion.noise import gaussian_noise, generator
from sdlora.diffusion.timesteps import uniform_timestep
from sdlora.families import Conditioning, Parts


@dataclass(frozen=True)
class Microbatch:
    """What a step is told of B pictures that pass the denoiser together.

    Attributes:
        mean: centre of the VAE's distribution, (B, C, h, w), fp32, on the CPU or already on the device.
        std: its deviation, the same shape, or `None`.
        conditioning: their texts and sizes.
        step: counted from 0.
        positions: number of each sample within the step, over all batches and processes, B numbers.
    """

    mean: Tensor
    std: Tensor | None
    conditioning: Conditioning
    step: int
    positions: Sequence[int]

    @property
    def places(self) -> Tensor:
        """Step and position of each sample, (B, 2), int64, CPU."""
        return torch.tensor([(self.step, position) for position in self.positions])


@dataclass(frozen=True)
class Draw:
    """The random part of a batch, a function of (seed, step, positions) alone.

    Attributes:
        latents: (B, C, h, w), drawn from the VAE's distribution where it has one.
        noise: (B, C, h, w).
        t: timesteps, (B,), int64.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor


def draw(
    mean: Tensor,
    std: Tensor | None,
    *,
    num_timesteps: int,
    seed: int,
    step: int,
    positions: Sequence[int],
    noise_offset: float,
) -> Draw:
    """Draws timesteps, noise and latents from a generator for each sample; the source for CPUs.

    Args:
        mean: centre of the VAE's distribution, (B, C, h, w), CPU.
        std: its deviation, the same shape, or `None`.
        num_timesteps: length of the schedule.
        seed: the run's.
        step: counted from 0.
        positions: number of each sample within the step, over all batches and processes, B numbers.
        noise_offset: see `gaussian_noise`.
    """
    latents, noises, timesteps = [], [], []
    for i, position in enumerate(positions):
        rng = generator(seed, "sample", step, position)
        shape = tuple(mean.shape[1:])
        timesteps.append(uniform_timestep(num_timesteps, rng))
        noises.append(gaussian_noise(shape, rng, offset=noise_offset))
        latents.append(mean[i] if std is None else mean[i] + std[i] * torch.randn(shape, generator=rng))
    return Draw(torch.stack(latents), torch.stack(noises), torch.tensor(timesteps))


def draw_counted(
    mean: Tensor, std: Tensor | None, places: Tensor, source: Philox, *, num_timesteps: int, noise_offset: float
) -> Draw:
    """Draws timesteps, noise and latents on the device, without a word from the CPU; the source for CUDA.

    Args:
        mean: centre of the VAE's distribution, (B, C, h, w), on the device.
        std: its deviation, the same shape, or `None`.
        places: step and position of each sample, (B, 2), int64, on the device.
        source: random words, on the device.
        num_timesteps: length of the schedule.
        noise_offset: see `gaussian_noise`.
    """
    shape = mean.shape
    size, channels = shape[1:].numel(), shape[1]
    # One stream for each sample: a block for the timestep, then noise, latents, offset, each from a block's start.
    lengths = [size, size if std is not None else 0, channels if noise_offset else 0]
    blocks = [-(-length // WORDS) for length in lengths]
    words = source.words(places, 1 + sum(blocks))
    stretches = normal(words[:, WORDS:]).split([WORDS * count for count in blocks], 1)
    numbers, more, offset = (stretch[:, :length] for stretch, length in zip(stretches, lengths, strict=True))
    noise = numbers.reshape(shape)
    if noise_offset:
        noise = noise + noise_offset * offset[..., None, None]
    latents = mean if std is None else mean + std * more.reshape(shape)
    return Draw(latents, noise, below(words[:, 0], num_timesteps))


def sample_losses(parts: Parts, drawn: Draw, conditioning: Conditioning, settings: TrainSection) -> Tensor:
    """Returns the weighted loss of each sample, (B,), fp32, with its graph.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 14, weighted as in Hang et al. 2023, arXiv:2303.09556.
    """
    schedule, device = parts.schedule, parts.device
    latents, noise, t = drawn.latents.to(device), drawn.noise.to(device), drawn.t.to(device)
    noisy = schedule.add_noise(latents, noise, t).to(parts.dtype)
    prediction = parts.family.denoise(parts, noisy, t, conditioning)
    error = squared_error(prediction, schedule.target(latents, noise, t))
    return error * min_snr_weight(schedule.snr(t), schedule.prediction, gamma=settings.min_snr_gamma)
