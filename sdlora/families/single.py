"""Single-file checkpoints: everything that a diffusers folder says in words is told here by keys and shapes.

Nothing is fetched: the configurations are the families' own, fitted to the shapes, and CLIP's tokenizer comes with the
package.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig

from sdlora.container import Container, open_container
from sdlora.errors import ModelError
from sdlora.families.components import Components
from sdlora.families.facts import read_facts
from sdlora.families.family import Family, TextEncoder
from sdlora.families.identify import identify_container, identify_file
from sdlora.families.layout import AVERAGE, Component, components, denoiser
from sdlora.families.shapes import denoiser_config, text_encoder_config, vae_config
from sdlora.families.tokenizers import clip_tokenizer
from sdlora.weights import assemble

__all__ = ["file_resolution", "identify_file", "load_file", "load_text_encoder", "load_vae"]

_NO_WEIGHTS = re.compile(
    r"(.*\.)?(position_ids|attn_mask|logit_scale)"  # worked out anew; of CLIP's training
    r"|(.*\.)?text_projection(\.weight)?|cond_stage_model\.model\.transformer\.resblocks\.23\..*"  # nobody asks for
    r"|\w*(betas|alphas_cumprod|alphas_cumprod_prev)|posterior_\w+|scale_factor|logvar|lvlb_weights"  # the schedule
    r"|denoiser\.(log_)?sigmas|v_pred|ztsnr"
    r"|(.*\.)?(model_ema|loss|discriminator)\..*|global_step"  # of the training program
)
"""Keys that hold nothing of the model, or nothing that the family uses."""


def file_resolution(path: Path, family: Family) -> int:
    """Returns the side in pixels that the denoiser of a single file was trained on; reads next to no weights.

    Raises:
        ModelError: if the file is damaged.
    """
    container = open_container(path, "base model", ModelError)
    return read_facts(container, denoiser(container), family).resolution


def file_width(path: Path) -> int:
    """Returns the channels of the first block of a single file's denoiser; reads no weights.

    Raises:
        ModelError: if the file is damaged.
    """
    return denoiser(open_container(path, "base model", ModelError)).side("conv_in.weight", 0)


def load_file(
    path: Path,
    family: Family,
    wanted: Collection[str],
    pooled: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Components:
    """Loads a single-file checkpoint.

    Args:
        path: the file.
        family: what it is, see `identify_file`.
        wanted: which of "vae" and the family's text encoders are read; only those that are there.
        pooled: width of the pooled text that a text encoder from elsewhere gives, if there is one.
        device: where the modules shall be.
        dtype: number format of denoiser and text encoders; the VAE is always fp32.

    Raises:
        ModelError: if it is damaged or incomplete.
    """
    container = open_container(path, "base model", ModelError)
    identify_container(container)
    found = components(container, family)
    facts = read_facts(container, found["denoiser"], family)
    specs = {s.component: s for s in family.text_encoders if s.component in wanted and s.component in found}
    loaded: dict[str, nn.Module] = {"denoiser": load_denoiser(found, family, facts.resolution, pooled, device, dtype)}
    if "vae" in wanted and "vae" in found:
        loaded["vae"] = load_vae(found["vae"], family, device)
    for name, spec in specs.items():
        loaded[name] = load_text_encoder(found[name], spec, device, dtype)
    return Components(
        denoiser=loaded["denoiser"],
        vae=loaded.get("vae"),
        text_encoders={name: loaded[name] for name in specs},
        tokenizers={name: clip_tokenizer(spec.pad) for name, spec in specs.items()},
        scheduler_config=facts.scheduler_config,
        resolution=facts.resolution,
        notes=[*facts.notes, *_notes(container, family, found, loaded)],
    )


def load_denoiser(
    found: Mapping[str, Component],
    family: Family,
    resolution: int,
    pooled: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> UNet2DConditionModel:
    """Loads the denoiser.

    Args:
        found: the file's components.
        family: what it is.
        resolution: side in pixels of the pictures that it was trained on.
        pooled: see `denoiser_config`.
        device: where it shall be.
        dtype: in which number format.

    Raises:
        ModelError: if it is damaged or incomplete.
    """
    config = denoiser_config(found, family, resolution, pooled)
    component = found["denoiser"]
    return assemble(lambda: UNet2DConditionModel(**config), component.weight, component.container.path, device, dtype)


def load_vae(vae: Component, family: Family, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Loads a VAE, in fp32.

    Raises:
        ModelError: if it is damaged or incomplete.
    """
    config = vae_config(vae, family)
    return assemble(lambda: AutoencoderKL(**config), vae.weight, vae.container.path, device)


def load_text_encoder(
    encoder: Component, spec: TextEncoder, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Loads a text encoder.

    Raises:
        ModelError: if it is damaged or incomplete, or made for another tokenizer than CLIP's.
    """
    config = text_encoder_config(encoder, spec)
    return assemble(lambda: spec.cls(CLIPTextConfig(**config)), encoder.weight, encoder.container.path, device, dtype)


def _notes(container: Container, family: Family, found: dict[str, Component], loaded: dict[str, Any]) -> list[str]:
    """Says what was assumed, and which keys were left aside."""
    name, notes = container.path.name, []
    if any(key.startswith(AVERAGE + "diffusion_model") for key in container.entries):
        only = any(key.startswith(AVERAGE) for key in found["denoiser"].section.values())
        notes.append(
            f"{name} holds averaged (EMA) weights {'only; they are used' if only else 'too; they are left aside'}"
        )
    if not _is_full_size(family, loaded):
        notes.append(
            f"{name} is of unusual width; attention heads and norm groups, which no single file tells, are assumed"
        )
    used = {found[part].key(path) for part, module in loaded.items() for path in module.state_dict()}
    used |= {key for part in found.keys() - loaded.keys() for key in found[part].section.values()}
    left = [key for key in container.entries if key not in used and not _NO_WEIGHTS.fullmatch(key)]
    if left:
        notes.append(
            f"{name} has {len(left)} keys that nothing is known of; they are left aside, e.g. {min(left)[:200]!r}"
        )
    return notes


def _is_full_size(family: Family, loaded: dict[str, Any]) -> bool:
    """Tells whether all that was loaded has the widths that the family's rules for heads and groups were made for."""
    full = {"denoiser": family.denoiser_config, "vae": family.vae_config}
    full |= {spec.component: spec.config for spec in family.text_encoders}
    widths = ("block_out_channels", "hidden_size")
    return all(
        getattr(module.config, width) == full[part][width]
        for part, module in loaded.items()
        for width in widths
        if width in full[part]
    )
