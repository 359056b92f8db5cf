"""Latents that only one kind of VAE understands, and how to tell whose a VAE's are when its weights do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.container import open_container
from sdlora.errors import ModelError
from sdlora.families.components import load_vae_folder


@dataclass(frozen=True)
class LatentSpace:
    """What VAEs share if one can read what the other wrote.

    Attributes:
        title: whose it is.
        folder: of the small VAE for it, or of one with the same encoder.
        decoder: TAESD's decoder, where the folder holds another one.
    """

    title: str
    folder: Path
    decoder: Path | None = None

    def load(self) -> Any:
        """Loads TAESD, an `AutoencoderTiny`, in fp32 on the CPU.

        Raises:
            ModelError: if its files are missing or damaged.
        """
        taesd: Any = load_vae_folder(self.folder, "")
        if self.decoder:
            weights = open_container(self.decoder, "decoder", ModelError)
            taesd.decoder.load_state_dict({key: weights.read(key) for key in weights.entries})
        return taesd


_HERE = Path(__file__).parent
_NANO = _HERE.parent / "nano" / "vae"

LATENT_SPACES: Mapping[float, LatentSpace] = {
    0.18215: LatentSpace("Stable Diffusion 1.x and 2.x", _NANO, _HERE / "taesd/decoder.safetensors"),
    0.13025: LatentSpace("Stable Diffusion XL", _HERE / "taesdxl"),
}
"""By the scaling factor of an AutoencoderKL; that of TAESD, of either kind, is 1."""

_SIDE = 96
_UNDERSTOOD, _NOT_UNDERSTOOD = 0.25, 0.5
"""Root mean square errors. Measured with the two TAESD themselves: 0.06 for the right one, 0.8 to 0.9 for the other."""


def require_latents(path: Path, vae: Any, scaling: float) -> None:
    """Refuses a VAE whose latents another family's TAESD understands, and this family's does not.

    The VAEs of SD 1.x and SDXL have the same layers and differ in nothing but values, and each TAESD learned the
    latents of one of them. A VAE that neither understands passes: it may be new, and it is not the wrong one.

    Args:
        path: where it was found.
        vae: the module, in fp32 on the CPU.
        scaling: of the latent space that the base needs, a key of `LATENT_SPACES`.

    Raises:
        ModelError: naming both.
    """
    picture = _colours()
    with torch.no_grad():
        encoded = vae.encode(picture)
        if hasattr(encoded, "latents"):  # TAESD, whose latents are scaled
            errors = {space: _error(picture, encoded.latents, of) for space, of in LATENT_SPACES.items()}
        else:
            mean = encoded.latent_dist.mean
            errors = {space: _error(picture, mean * space, of) for space, of in LATENT_SPACES.items()}
    best = min(errors, key=lambda space: errors[space])
    if errors[best] < _UNDERSTOOD and errors[scaling] > _NOT_UNDERSTOOD:
        raise ModelError(
            f"the VAE in {path} is that of {LATENT_SPACES[best].title}, as its latents show. The base is "
            f"{LATENT_SPACES[scaling].title}, and colours would be wrong"
        )


def _colours() -> Tensor:
    """Returns a picture, (1, 3, 96, 96), whose colours change along both sides."""
    ramp = torch.linspace(-1, 1, _SIDE).expand(_SIDE, _SIDE)
    return torch.stack([ramp, ramp.T, -ramp])[None]


def _error(picture: Tensor, latents: Tensor, space: LatentSpace) -> float:
    """Returns by how much TAESD's picture of scaled latents is off, root mean square."""
    return (space.load().decode(latents).sample.clamp(-1, 1) - picture).square().mean().sqrt().item()
