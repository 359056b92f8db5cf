"""Random numbers as a function of (seed, step, position), never of history.

Each sample of each step has a generator of its own, on the CPU. So step n can be computed without step n - 1, a resumed
run repeats an uninterrupted one bit for bit, and the numbers do not depend on the batch size. What a step draws on CUDA
comes from `counter.py` instead, with the same properties: those numbers depend on the kind of device, but not on the
batch size, the number of processes, or whether the step is recorded as a graph.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """Returns a CPU generator whose stream is decided by the key alone.

    Args:
        *key: what the numbers belong to, e.g. `(seed, "noise", step, position)`.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def gaussian_noise(shape: tuple[int, ...], rng: torch.Generator, *, offset: float = 0.0) -> Tensor:
    """Draws the noise of one sample.

    Args:
        shape: (C, h, w).
        rng: the sample's generator.
        offset: standard deviation of an extra constant per channel; lets the model learn very dark or bright pictures.

    Source: noise offset as in sd-scripts' `apply_noise_offset`, from Crosslabs, "Diffusion with Offset Noise", 2023.
    """
    noise = torch.randn(shape, generator=rng)
    if offset:
        noise = noise + offset * torch.randn((shape[0], 1, 1), generator=rng)
    return noise
