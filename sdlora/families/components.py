"""What a base model on the disk is made of, read and not yet put together."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTokenizer

from sdlora.errors import ModelError
from sdlora.families.family import Family
from sdlora.families.folders import load_component, read_json

VAE_FACTOR = 8
"""Pixels per latent, in every family."""

_VAES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclass(kw_only=True)
class Components:
    """Modules, and what is known of them.

    Attributes:
        denoiser: the UNet.
        vae: `None` if the source has none, or it was not asked for.
        text_encoders: by component name; those that are there.
        tokenizers: by component name.
        scheduler_config: noise schedule and prediction type.
        resolution: side in pixels of the square pictures that the denoiser was trained on.
        notes: what the user should know of how it was read, a sentence each.
    """

    denoiser: nn.Module
    vae: nn.Module | None = None
    text_encoders: dict[str, nn.Module] = field(default_factory=dict)
    tokenizers: dict[str, Any] = field(default_factory=dict)
    scheduler_config: dict[str, Any]
    resolution: int
    notes: list[str] = field(default_factory=list)


def load_folder(
    folder: Path,
    family: Family,
    wanted: Collection[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Components:
    """Loads a diffusers folder.

    Args:
        folder: holds `unet/`, `vae/`, `scheduler/`, and for each text encoder its folder and that of its tokenizer.
        family: what it is.
        wanted: which of "vae" and the family's text encoders are read.
        device: where they shall be.
        dtype: number format of denoiser and text encoders; the VAE is always fp32.

    Raises:
        ModelError: if a part is missing or damaged.
    """
    encoders = load_text_encoders(folder, family, wanted, device, dtype)
    return Components(
        denoiser=load_component(UNet2DConditionModel, folder, "unet", device, dtype),
        vae=load_vae_folder(folder, device=device) if "vae" in wanted else None,
        text_encoders={name: encoder for name, (encoder, _) in encoders.items()},
        tokenizers={name: tokenizer for name, (_, tokenizer) in encoders.items()},
        scheduler_config=read_json(folder / "scheduler" / "scheduler_config.json"),
        resolution=folder_resolution(folder),
    )


def load_text_encoders(
    folder: Path,
    family: Family,
    wanted: Collection[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[nn.Module, Any]]:
    """Loads text encoders and their tokenizers from a diffusers folder: component name -> (encoder, tokenizer).

    Raises:
        ModelError: if one is missing or damaged.
    """
    found = {}
    for spec in family.text_encoders:
        if spec.component in wanted:
            tokenizer = spec.component.replace("text_encoder", "tokenizer")
            found[spec.component] = (
                load_component(spec.cls, folder, spec.component, device, dtype),
                load_component(CLIPTokenizer, folder, tokenizer),
            )
    return found


def load_vae_folder(folder: Path, name: str = "vae", device: torch.device | str = "cpu") -> nn.Module:
    """Loads the VAE of a diffusers folder, in fp32.

    Args:
        folder: the folder.
        name: of the folder in it that holds the VAE; empty if it is the VAE itself.
        device: where it shall be.

    Raises:
        ModelError: if it is missing, damaged, or of a kind that Stable Diffusion does not have.
    """
    kind = read_json(folder / name / "config.json").get("_class_name", "AutoencoderKL")
    if kind not in _VAES:
        raise ModelError(f"{folder / name} is a {kind}; an AutoencoderKL or an AutoencoderTiny is needed")
    return load_component(_VAES[kind], folder, name, device)


def folder_resolution(folder: Path) -> int:
    """Returns the side in pixels that the denoiser of a diffusers folder was trained on; reads no weights.

    Raises:
        ModelError: if its configuration is missing or damaged.
    """
    size = read_json(folder / "unet" / "config.json").get("sample_size", 64)
    return (size if isinstance(size, int) else max(size)) * VAE_FACTOR


def folder_width(folder: Path) -> int:
    """Returns the channels of the first block of a diffusers folder's denoiser; reads no weights.

    Raises:
        ModelError: if its configuration is missing or damaged.
    """
    return read_json(folder / "unet" / "config.json").get("block_out_channels", [320])[0]


def identify_folder(folder: Path) -> str:
    """Tells the family of a diffusers folder, by name, from its configuration files.

    Raises:
        ModelError: if it is no Stable Diffusion, or one that is not trained on text alone.
    """
    index = read_json(folder / "model_index.json")
    if "transformer" in index or "unet" not in index:
        kind = index.get("_class_name", "model without a UNet")
        raise ModelError(f"{folder} is a {kind}; Stable Diffusion 1.x, 2.x and XL can be trained")
    unet = read_json(folder / "unet" / "config.json")
    require_text_to_image(folder, unet.get("in_channels", 4))
    if unet.get("addition_embed_type") == "text_time" or "text_encoder_2" in index:
        if "text_encoder" not in index or index["text_encoder"] == [None, None]:
            raise ModelError(f"{folder} is SDXL's refiner, which no LoRA is trained on; give the SDXL base")
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


_OTHER_INPUTS = {9: "an inpainting model", 8: "an image-editing model (pix2pix)", 5: "a depth model", 7: "an upscaler"}


def require_text_to_image(path: Path, in_channels: int) -> None:
    """Refuses denoisers that want more than noisy latents.

    Raises:
        ModelError: naming what the model is for.
    """
    if in_channels != 4:
        what = _OTHER_INPUTS.get(in_channels, "made for another purpose")
        raise ModelError(
            f"{path} is {what}: its denoiser takes {in_channels} channels, and 4 are needed. Train on the "
            "text-to-image model that it was made from; the LoRA will load in both"
        )
