"""Which noise levels are trained."""

from __future__ import annotations

import torch


def uniform_timestep(num_timesteps: int, rng: torch.Generator) -> int:
    """Draws one timestep from 0 to num_timesteps - 1, each equally likely."""
    return int(torch.randint(num_timesteps, (), generator=rng))
