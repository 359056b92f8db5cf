"""How a picture is drawn, in plain counts: its colours, the colours of its even places and of its outlines, its shades.

Legend: N pictures in RGB on white, values in [0, 1]; L levels of red, green and blue.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from tools.style_bench.jitter import LUMA

LEVELS, COARSE = 17, 9
"""Levels of colours, and of the colours of outlines."""
EVEN, SHARP = 0.06, 0.25
"""A place is even if the 3 x 3 pixels around it differ by less than this; at an outline, by more than that."""
SCALES = (1, 2, 4, 8)
"""Distances in pixels over which shades are looked at."""
STEPS = (0.0, 0.004, 0.008, 0.015, 0.03, 0.05, 0.08, 0.12, 0.2, 0.35, 0.6)
"""Differences of brightness that are counted apart, the least of each class."""
BRIGHT, VIVID = 4, 3
"""Classes of brightness and of saturation in which these are counted."""
SIZE = 2 * LEVELS**3 + COARSE**3 + len(SCALES) * len(STEPS) * BRIGHT * VIVID
"""Numbers that `surface` gives."""


def surface(pictures: Tensor) -> Tensor:
    """Describes pictures by square roots of shares, each of them a share of the picture's pixels.

    Args:
        pictures: (N, 3, H, W), H and W at least 9.

    Returns:
        (N, SIZE), fp32: `palette`; that of the even places; that of the darkest pixels at outlines; and how often
        brightness changes by how much over how far, from where.
    """
    pictures = pictures.float()
    low, high = _least(pictures), -_least(-pictures)
    spread = (high - low).amax(1)[:, 1::2, 1::2].flatten(1)
    seen, dark = (x[:, :, 1::2, 1::2].flatten(2) for x in (pictures, low))
    parts = (
        palette(pictures, LEVELS),
        _shares(seen, (spread < EVEN).float(), LEVELS),
        _shares(dark, (spread > SHARP).float(), COARSE),
        shades(pictures),
    )
    return torch.cat(parts, 1)


def palette(pictures: Tensor, levels: int) -> Tensor:
    """Says how much of a picture is in each colour.

    Every ninth pixel counts, divided among the eight colours of a grid that are nearest in red, green and blue.

    Args:
        pictures: (N, 3, H, W).
        levels: L, at least 2.

    Returns:
        The square root of each colour's share of the pixels, (N, L^3), fp32; red changes slowest.
    """
    seen = pictures[:, :, 1::3, 1::3].float().flatten(2)
    return _shares(seen, seen.new_ones(len(seen), seen.shape[2]), levels)


def shades(pictures: Tensor) -> Tensor:
    """Counts changes of brightness, so that flat fills, soft shadows and hard edges differ.

    Args:
        pictures: (N, 3, H, W), H and W at least 9.

    Returns:
        The square root of each class's share of the pixels, (N, SCALES * STEPS * BRIGHT * VIVID), fp32.
    """
    bright = (pictures * LUMA[:, None, None].to(pictures)).sum(1)  # a product of matrices would be rounded to bf16
    vivid = pictures.amax(1) - pictures.amin(1)
    place = (bright * BRIGHT).long().clamp(0, BRIGHT - 1) * VIVID + (vivid * VIVID).long().clamp(0, VIVID - 1)
    bounds = pictures.new_tensor(STEPS[1:])
    counts = []
    for far in SCALES:
        here = bright[:, :-far, :-far]
        change = torch.maximum((bright[:, :-far, far:] - here).abs(), (bright[:, far:, :-far] - here).abs())
        kind = torch.bucketize(change, bounds, right=True) * (BRIGHT * VIVID) + place[:, :-far, :-far]
        kind = kind.flatten(1)
        found = pictures.new_zeros(len(pictures), len(STEPS) * BRIGHT * VIVID)
        counts.append(found.scatter_add_(1, kind, here.new_ones(()).expand_as(kind)) / kind.shape[1])
    return torch.cat(counts, 1).sqrt()


def _shares(colours: Tensor, weights: Tensor, levels: int) -> Tensor:
    """Returns the root of each colour's share: colours (N, 3, M), weights (N, M) -> (N, L^3); divided by M."""
    place = colours * (levels - 1)
    below = place.floor().clamp(0, levels - 2)
    high = (place - below).clamp(0, 1)  # a value just outside would make a share negative
    red, green, blue = below.long().unbind(1)
    corner = (red * levels + green) * levels + blue
    shares = colours.new_zeros(len(colours), levels**3)
    for r, g, b in product((0, 1), repeat=3):
        part = [high[:, n] if up else 1 - high[:, n] for n, up in enumerate((r, g, b))]
        shares.scatter_add_(1, corner + (r * levels + g) * levels + b, part[0] * part[1] * part[2] * weights)
    return (shares / colours.shape[2]).sqrt()


def _least(x: Tensor) -> Tensor:
    """Returns the least value among the 3 x 3 around each pixel, by channel; the edge is continued."""
    for axis in (2, 3):
        size = x.shape[axis]
        before = torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, size - 1)), axis)
        after = torch.cat((x.narrow(axis, 1, size - 1), x.narrow(axis, size - 1, 1)), axis)
        x = torch.minimum(torch.minimum(before, after), x)
    return x
