"""The loop to compare with: diffusers + peft + torch's AdamW, written as diffusers' example trains.

Source: diffusers, `examples/text_to_image/train_text_to_image_lora.py` (and `_sdxl`), with latents and text states
cached as here on both sides, and the factors cast to fp32, as the example does for fp16 and accelerate's users do for
bf16. accelerate's mixed precision is `torch.autocast` around the forward pass with its output cast to fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn

from sdlora.families import Conditioning
from sdlora.training.step import Draw
from tools.bench.inputs import Factors, gradient
from tools.bench.rows import RANK, REFERENCE_TARGETS

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
_SCHEDULE_SETTINGS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")


class Reference:
    """A denoiser that trains as diffusers' example does it.

    Args:
        denoiser: a diffusers UNet in its weight dtype; is frozen and gets peft's adapters.
        scheduler_config: of the checkpoint.
        rank: of the LoRA; alpha is the same.
        targets: what the adapted layers' paths end with.
        checkpointing: whether blocks compute their activations again in the backward pass.
    """

    notes = ()

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler_config: Mapping[str, Any],
        *,
        rank: int = RANK,
        targets: tuple[str, ...] = REFERENCE_TARGETS,
        checkpointing: bool = False,
    ) -> None:
        self.denoiser: Any = denoiser
        self.weight_dtype: torch.dtype = self.denoiser.dtype
        self.device_type = self.denoiser.device.type
        known = {key: scheduler_config[key] for key in _SCHEDULE_SETTINGS if key in scheduler_config}
        self.scheduler = DDPMScheduler(**known)
        self.denoiser.requires_grad_(False)
        self.denoiser.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))
        )
        cast_training_params(self.denoiser, dtype=torch.float32)
        if checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.denoiser.train()
        self.parameters = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
        )

    def forward_backward(self, drawn: Draw, conditioning: Conditioning) -> Tensor:
        """Adds the gradients of a batch's mean squared error; returns it, a scalar.

        The example reads the loss of every step for its progress bar, so this waits for the device.
        """
        latents, noise = drawn.latents.to(self.weight_dtype), drawn.noise.to(self.weight_dtype)
        noisy: Any = self.scheduler.add_noise(latents, noise, drawn.t)  # type: ignore[arg-type]
        epsilon = self.scheduler.config["prediction_type"] == "epsilon"
        target: Any = noise if epsilon else self.scheduler.get_velocity(latents, noise, drawn.t)  # type: ignore[arg-type]
        with torch.autocast(self.device_type, self.weight_dtype, enabled=self.weight_dtype != torch.float32):
            prediction = predict(self.denoiser, noisy, drawn.t, conditioning)
        loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
        loss.item()
        loss.backward()
        return loss.detach()

    def step(self, drawn: Draw, conditioning: Conditioning) -> Tensor:
        """Does a whole optimizer step."""
        loss = self.forward_backward(drawn, conditioning)
        self.update()
        return loss

    def update(self) -> None:
        """Clips the gradients, steps AdamW and drops the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        return {
            path: (module.lora_A["default"].weight, module.lora_B["default"].weight)
            for path, module in self.denoiser.named_modules()
            if hasattr(module, "lora_A")
        }

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Gives every adapter its values.

        Raises:
            ValueError: if the adapted layers are not those of `factors`.
        """
        own = self._factors()
        if own.keys() != factors.keys():
            raise ValueError(f"peft adapts {len(own)} layers and {len(factors)} were given, or others")
        for path, (down, up) in factors.items():
            own[path][0].copy_(down)
            own[path][1].copy_(up)

    def gradients(self) -> Factors:
        """Returns the gradients that `forward_backward` left, by path, fp32, on the CPU."""
        return {path: (gradient(down), gradient(up)) for path, (down, up) in self._factors().items()}

    def frozen_weights(self) -> dict[str, Tensor]:
        """The base's own weights are what it computes with."""
        return {}


def predict(denoiser: Any, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Calls a diffusers UNet as the examples do, with SDXL's sizes and pooled text where there are any."""
    added = None
    if "pooled" in conditioning:
        added = {"text_embeds": conditioning["pooled"], "time_ids": conditioning["sizes"]}
    return denoiser(noisy, t, conditioning["states"], added_cond_kwargs=added, return_dict=False)[0]
