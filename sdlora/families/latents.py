"""Pictures <-> scaled latents, for the VAEs of every family: AutoencoderKL, and TAESD, which has no distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sdlora.families.family import Parts


def encode_images(parts: Parts, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encodes pixels, (B, 3, H, W) in [-1, 1], into the mean and deviation of scaled latents, (B, C, H/8, W/8)."""
    vae: Any = parts.vae
    scale = vae.config.scaling_factor
    encoded = vae.encode(pixels.to(next(vae.parameters()).dtype))
    if hasattr(encoded, "latents"):  # TAESD draws no sample
        return encoded.latents * scale, None
    return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale


def decode_latents(parts: Parts, latents: Tensor) -> Tensor:
    """Decodes scaled latents, (B, C, h, w), into pixels, (B, 3, 8h, 8w), in [-1, 1]."""
    vae: Any = parts.vae
    latents = latents.to(next(vae.parameters()).dtype) / vae.config.scaling_factor
    return vae.decode(latents).sample.clamp(-1, 1)
