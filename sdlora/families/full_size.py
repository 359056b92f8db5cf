"""The models of a family at their real size, without any memory behind them: names and shapes to check against."""

from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig

from sdlora.families.family import Family


def full_size_models(family: Family) -> dict[str, nn.Module]:
    """Builds the denoiser and the text encoders on the meta device, by component name."""
    with torch.device("meta"):
        denoiser = UNet2DConditionModel(**family.denoiser_config)
        encoders = {e.component: e.cls(CLIPTextConfig(**e.config)) for e in family.text_encoders}
    return {"denoiser": denoiser, **encoders}
