"""The noise schedule of a checkpoint: how much signal is left at each timestep, and what the denoiser predicts.

Legend: B batch, C latent channels, h w latent size (pixels / 8), T number of timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Schedule:
    """A discrete variance-preserving schedule.

    Attributes:
        alphas_cumprod: share of the signal's variance left at each timestep, (T,), falling, in [0, 1). Called
            alpha-bar in Ho et al.
        prediction: what the denoiser was trained to return, "epsilon" or "v_prediction".
    """

    alphas_cumprod: Tensor
    prediction: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], prediction: str = "auto") -> Schedule:
        """Reads the schedule from a diffusers scheduler configuration.

        Args:
            config: the contents of `scheduler_config.json`.
            prediction: "auto" takes the checkpoint's word for it.

        Raises:
            ValueError: for a schedule or a prediction that is not known here.

        Source: agrees with `diffusers.DDPMScheduler(**config)`.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        elif kind == "squaredcos_cap_v2":
            betas = _cosine_betas(steps)
        else:
            raise ValueError(f"unknown beta_schedule {kind!r}; known: linear, scaled_linear, squaredcos_cap_v2")
        if config.get("rescale_betas_zero_snr"):
            betas = _zero_terminal_snr(betas)
        if prediction == "auto":
            prediction = config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction type {prediction!r}; known: {', '.join(PREDICTIONS)}")
        return cls(torch.cumprod(1 - betas, dim=0), prediction)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> Schedule:
        """Returns the schedule with its table on a device."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def snr(self, t: Tensor) -> Tensor:
        """Returns the signal-to-noise ratio alpha-bar / (1 - alpha-bar) at timesteps t, (B,) -> (B,)."""
        alpha_bar = self.alphas_cumprod[t]
        return alpha_bar / (1 - alpha_bar)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mixes latents and noise, (B, C, h, w), as they look at timesteps t, (B,).

        Source: Ho et al. 2020, arXiv:2006.11239, equation 4.
        """
        signal, sigma = self._mix(latents, t)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Returns what the denoiser should have predicted, (B, C, h, w).

        Source: epsilon: Ho et al. 2020, equation 14; v: Salimans and Ho 2022, arXiv:2202.00512, appendix D.
        """
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._mix(latents, t)
        return signal * noise - sigma * latents

    def _mix(self, latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alphas_cumprod[t].to(latents.dtype).reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _zero_terminal_snr(betas: Tensor) -> Tensor:
    # Lin et al. 2023, arXiv:2305.08891, algorithm 1: shift so that the last step is pure noise, keep the first.
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def _cosine_betas(steps: int) -> Tensor:
    # Nichol and Dhariwal 2021, arXiv:2102.09672, equation 17.
    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])
