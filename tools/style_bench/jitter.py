"""Changes to pictures that no judge may care about: size, place, colour, sharpness, noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA = torch.tensor([0.299, 0.587, 0.114])


def moved(
    pictures: Tensor,
    rng: torch.Generator,
    *,
    smallest: float,
    largest: float,
    turn: float,
    mirror: bool,
) -> Tensor:
    """Scales, shifts, turns and mirrors each picture by itself; what comes in from outside is white.

    Args:
        pictures: (N, 3, H, W) in [0, 1].
        rng: source of randomness.
        smallest: least scale.
        largest: greatest scale; above 1 the margin is cut off, and maybe more.
        turn: greatest angle in degrees, either way.
        mirror: whether half of the pictures are flipped left to right.

    Returns:
        (N, 3, H, W).
    """
    count = len(pictures)
    draw = torch.rand(count, 5, generator=rng)
    scale = smallest * (largest / smallest) ** draw[:, 0]
    angle = (draw[:, 1] * 2 - 1) * turn * math.pi / 180
    flip = torch.where((draw[:, 2] < 0.5) & mirror, -1.0, 1.0)
    room = (1 - scale).abs().clamp_min(0.05)
    shift = (draw[:, 3:] * 2 - 1) * room[:, None]
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    rows = torch.stack(
        (torch.stack((flip * cosine, -sine, -shift[:, 0]), 1), torch.stack((flip * sine, cosine, -shift[:, 1]), 1)), 1
    )
    grid = F.affine_grid(rows, list(pictures.shape), align_corners=False)
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False)


def recoloured(pictures: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    """Changes brightness, contrast, saturation and hue of each picture by itself.

    Args:
        pictures: (N, 3, H, W) in [0, 1].
        rng: source of randomness.
        strength: greatest relative change of contrast and saturation; brightness changes by half of it, hue by a
            turn of half of it in radians.
    """
    brightness, contrast, saturation, hue = (torch.rand(4, len(pictures), generator=rng) * 2 - 1) * strength
    grey = LUMA.expand(3, 3)
    axis = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    angle = hue[:, None, None] / 2
    turned = torch.eye(3) + angle.sin() * axis + (1 - angle.cos()) * (axis @ axis)
    matrix = (turned * (1 + saturation)[:, None, None] + grey * -saturation[:, None, None]) * (1 + contrast)[
        :, None, None
    ]
    offset = (brightness - contrast) / 2
    return (torch.einsum("nij,njhw->nihw", matrix, pictures) + offset[:, None, None, None]).clamp(0, 1)


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Blurs with a Gaussian of `sigma` pixels; the edge is continued."""
    radius = max(1, math.ceil(2.5 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float32)
    line = torch.exp(-(x**2) / (2 * sigma**2))
    line = line / line.sum()
    count, channels, height, width = pictures.shape
    flat = pictures.reshape(count * channels, 1, height, width)
    flat = F.conv2d(F.pad(flat, (radius,) * 4, mode="replicate"), line[None, None, :, None])
    return F.conv2d(flat, line[None, None, None, :]).reshape(pictures.shape)


def roughened(pictures: Tensor, rng: torch.Generator, *, blur: float, noise: float) -> Tensor:
    """Mixes each picture with its 3x3 mean, and adds noise.

    Args:
        pictures: (N, 3, H, W) in [0, 1].
        rng: source of randomness.
        blur: greatest share of the mean.
        noise: greatest standard deviation of the noise.
    """
    count = len(pictures)
    share, strength = torch.rand(2, count, 1, 1, 1, generator=rng) ** 2
    mean = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    rough = torch.randn(pictures.shape, generator=rng) * (strength * noise)
    return (pictures.lerp(mean, share * blur) + rough).clamp(0, 1)


def spoiled(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Makes pictures that are in no style: two blended, one blurred beyond recognition, or coloured noise.

    Args:
        pictures: (N, 3, H, W) in [0, 1]; neighbours should differ in style.
        rng: source of randomness.
    """
    count, _, height, width = pictures.shape
    kind = torch.randint(3, (count,), generator=rng)
    share = torch.rand(count, 1, 1, 1, generator=rng)
    blend = pictures.lerp(pictures.roll(1, 0), 0.35 + 0.3 * share)
    smooth = blurred(pictures, 3.5 + 4 * float(torch.rand((), generator=rng)))
    coarse = 2 ** int(torch.randint(1, 8, (), generator=rng))
    noise = torch.randn(count, 3, min(coarse, height), min(coarse, width), generator=rng) * 0.3 * (0.3 + share) + 0.6
    noise = F.interpolate(noise, (height, width), mode="bilinear", align_corners=False).clamp(0, 1)
    return torch.stack((blend, smooth, noise))[kind, torch.arange(count)]
