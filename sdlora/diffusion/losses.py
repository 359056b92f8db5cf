"""How much an error counts.

Legend: B batch, C latent channels, h w latent size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns each sample's mean squared error in fp32, (B, C, h, w) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weight(snr: Tensor, prediction: str, *, gamma: float = 5.0) -> Tensor:
    """Caps the weight of nearly clean pictures so that they stop dominating the gradient.

    Args:
        snr: signal-to-noise ratio at each sample's timestep, (B,), not negative.
        prediction: "epsilon" or "v_prediction"; decides what the uncapped weight would be.
        gamma: the cap; 5 in the paper, 0 returns ones.

    Returns:
        Factor for each sample's squared error, (B,), in [0, 1].

    Source: Hang et al. 2023, arXiv:2303.09556; epsilon: min(snr, gamma) / snr, v: min(snr, gamma) / (snr + 1).
    """
    if not gamma:
        return torch.ones_like(snr)
    capped = snr.clamp(max=gamma)
    if prediction == "v_prediction":
        return capped / (snr + 1)
    return torch.where(snr > 0, capped / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)
