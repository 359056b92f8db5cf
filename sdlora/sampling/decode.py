"""Latents become pictures, one by one: by the base's own VAE or, for a quick look, by TAESD.

A VAE computes in fp32 and needs far more memory for a picture than the denoiser does, so several at once win nothing:
TAESD takes 4.1 times as long for four pictures as for one (one CPU core, 128 px).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor, nn

from sdlora.errors import ModelError
from sdlora.families import Parts
from sdlora.families.latent_spaces import LATENT_SPACES
from sdlora.sampling.modes import evaluating
from sdlora.sampling.prompts import Prompt

TAESD = "TAESD"
"""How the WebUI's PNG texts call a picture's decoder that is not the base's own VAE."""


def quick_vae(parts: Parts) -> nn.Module | None:
    """Loads TAESD for the base's latents, in fp32 on the CPU; `None` if the base's VAE is a TAESD, or there is none.

    Raises:
        ModelError: if its files are missing or damaged.
    """
    config: dict[str, object] = parts.vae.config  # type: ignore[assignment]
    space = LATENT_SPACES.get(config["scaling_factor"])  # type: ignore[call-overload]
    return space.load() if space else None


@torch.no_grad()
def decode(
    parts: Parts, latents: Sequence[Tensor], prompts: Sequence[Prompt], vae: nn.Module | None = None
) -> list[Image.Image]:
    """Decodes what `pipeline.draw_latents` returned.

    The VAE is brought to the denoiser's device, if it lies elsewhere, and back. From the first picture on for which
    there is too little memory, they are decoded on the CPU.

    Args:
        parts: the base.
        latents: scaled, each (C, h, w).
        prompts: of the pictures, for messages.
        vae: takes the place of the base's own.

    Raises:
        ModelError: if the VAE returns numbers that are not finite.
    """
    parts = parts if vae is None else replace(parts, vae=vae)
    device, pictures = parts.device, []
    with _visiting(parts.vae), evaluating(parts.vae):
        for one, prompt in zip(latents, prompts, strict=True):
            try:
                pixels = _pixels(parts, one, device)
            except torch.OutOfMemoryError:
                device = torch.device("cpu")
                pixels = _pixels(parts, one, device)
            require_finite(pixels, prompt, "VAE", pixels.dtype)
            levels = ((pixels[0].float() + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
            pictures.append(Image.fromarray(levels.cpu().numpy()))
    return pictures


def _pixels(parts: Parts, latents: Tensor, device: torch.device) -> Tensor:
    nn.Module.to(parts.vae, device)  # diffusers' own `to` gives advice
    batch = latents[None].to(device)
    if device.type == "cpu":
        # TAESD takes 0.83 of the time it takes otherwise (median of 9 pairs, one core, 128 px); AutoencoderKL the same.
        batch = batch.contiguous(memory_format=torch.channels_last)
    return parts.family.decode_latents(parts, batch)


def require_finite(values: Tensor, prompt: Prompt, who: str, dtype: torch.dtype) -> None:
    """Refuses numbers that are infinite or not a number.

    Args:
        values: what a part of the base returned.
        prompt: what was being drawn.
        who: the part.
        dtype: its number format.

    Raises:
        ModelError: naming all of it.
    """
    if torch.isfinite(values).all():
        return
    word = str(dtype).removeprefix("torch.")
    hint = "use --precision fp32" if dtype == torch.float16 else "check the base and the strengths of the LoRAs"
    raise ModelError(
        f"the {who} returned numbers that are not finite ({word}, prompt {prompt.text!r}, seed {prompt.seed}); {hint}"
    )


@contextmanager
def _visiting(module: nn.Module) -> Iterator[None]:
    home = next(module.parameters()).device
    try:
        yield
    finally:
        nn.Module.to(module, home)
