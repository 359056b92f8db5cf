"""What a base model is: data first, a few plain functions second, no inheritance.

Legend: B batch, C latent channels, h w latent size, H W pixel size, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.adapters import Target
from sdlora.diffusion.schedule import Schedule
from sdlora.families.folders import quiet

Conditioning = dict[str, Tensor]
"""What the denoiser is told besides the noisy latents, each tensor with the batch in front.

SD 1.x has `states`, (B, L, D): the text encoder's hidden states.
"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of base model.

    Attributes:
        name: `sd1`.
        denoiser_width: channels of the widest block of the family's full-size denoiser; scales the learning rate.
        targets: layers of the denoiser by the words of `lora.targets`.
        text_encoder_targets: layers of a text encoder.
        metadata: `ss_base_model_version` and the `modelspec.*` facts that loaders go by.
        native_resolution: folder -> side in pixels of the square pictures that the checkpoint was trained on; reads no
            weights.
        load: folder -> Parts.
        encode_prompts: texts -> Conditioning, gradients flowing into the text encoder if it trains.
        denoise: what the denoiser predicts, (B, C, h, w).
        encode_images: pixels (B, 3, H, W) in [-1, 1] -> mean and standard deviation of the scaled latents, each
            (B, C, h, w); the deviation is `None` where the VAE is deterministic.
        decode_latents: scaled latents -> pixels in [-1, 1].
        lora_key: (component, module path) -> module name in a kohya file.
        pipeline: Parts, scheduler -> a diffusers pipeline that draws with these very modules.
    """

    name: str
    denoiser_width: int
    targets: Mapping[str, tuple[Target, ...]]
    text_encoder_targets: tuple[Target, ...]
    metadata: Mapping[str, str]
    native_resolution: Callable[[Path], int]
    load: Callable[[Path, str], Parts]
    encode_prompts: Callable[[Parts, Sequence[str], int], Conditioning]
    denoise: Callable[[Parts, Tensor, Tensor, Conditioning], Tensor]
    encode_images: Callable[[Parts, Tensor], tuple[Tensor, Tensor | None]]
    decode_latents: Callable[[Parts, Tensor], Tensor]
    lora_key: Callable[[str, str], str]
    pipeline: Callable[[Parts, Any], Any]


@dataclass(kw_only=True)
class Parts:
    """The loaded modules of one base model.

    Attributes:
        family: the kind of model.
        name: what the user calls it: an alias, a hub id or a folder's name.
        denoiser: the UNet.
        vae: pictures <-> latents.
        text_encoders: by component name, e.g. `text_encoder`.
        tokenizers: by the same names.
        schedule: noise schedule and prediction type, read from the checkpoint.
        scheduler_config: the checkpoint's scheduler configuration, for samplers.
        resolution: side in pixels of the square pictures that it was trained on.
        vae_factor: pixels per latent, 8.
    """

    family: Family
    name: str
    denoiser: nn.Module
    vae: nn.Module
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]
    schedule: Schedule
    scheduler_config: dict[str, Any]
    resolution: int
    vae_factor: int = 8

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that can carry a LoRA, by component name; `denoiser` first."""
        return {"denoiser": self.denoiser, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        """Where the denoiser lies."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's number format."""
        return next(self.denoiser.parameters()).dtype

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Parts:
        """Moves everything to a device. The VAE stays fp32: in fp16 some VAEs overflow to black pictures."""
        with quiet():  # diffusers warns of modules to be kept in fp32, and then names none
            for module in self.components.values():
                module.to(device, dtype)
            self.vae.to(device, torch.float32)
        self.schedule = self.schedule.to(device)
        return self
