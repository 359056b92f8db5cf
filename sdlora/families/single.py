"""Single-file checkpoints: everything that a diffusers folder says in words is told here by keys and shapes.

Nothing is fetched: the configurations are the families' own, fitted to the shapes, and CLIP's tokenizer comes with the
package.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
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


def load_file(path: Path, family: Family, wanted: Collection[str], pooled: int | None = None) -> Components:
    """Loads a single-file checkpoint in fp32 on the CPU.

    Args:
        path: the file.
        family: what it is, see `identify_file`.
        wanted: which of "vae" and the family's text encoders are read; only those that are there.
        pooled: width of the pooled text that a text encoder from elsewhere gives, if there is one.

    Raises:
        ModelError: if it is damaged or incomplete.
    """
    container = open_container(path, "base model", ModelError)
    identify_container(container)
    found = components(container, family)
    facts = read_facts(container, found["denoiser"], family)
    specs = {s.component: s for s in family.text_encoders if s.component in wanted and s.component in found}
    loaded: dict[str, nn.Module] = {"denoiser": load_denoiser(found, family, facts.resolution, pooled)}
    if "vae" in wanted and "vae" in found:
        loaded["vae"] = load_vae(found["vae"], family)
    for name, spec in specs.items():
        loaded[name] = load_text_encoder(found[name], spec)
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
    found: Mapping[str, Component], family: Family, resolution: int, pooled: int | None = None
) -> UNet2DConditionModel:
    """Loads the denoiser.

    Args:
        found: the file's components.
        family: what it is.
        resolution: side in pixels of the pictures that it was trained on.
        pooled: see `denoiser_config`.

    Raises:
        ModelError: if it is damaged or incomplete.
    """
    config = denoiser_config(found, family, resolution, pooled)
    return _loaded(found["denoiser"], lambda: UNet2DConditionModel(**config))


def load_vae(vae: Component, family: Family) -> AutoencoderKL:
    """Loads a VAE.

    Raises:
        ModelError: if it is damaged or incomplete.
    """
    config = vae_config(vae, family)
    return _loaded(vae, lambda: AutoencoderKL(**config))


def load_text_encoder(encoder: Component, spec: TextEncoder) -> Any:
    """Loads a text encoder.

    Raises:
        ModelError: if it is damaged or incomplete, or made for another tokenizer than CLIP's.
    """
    config = text_encoder_config(encoder, spec)
    return _loaded(encoder, lambda: spec.cls(CLIPTextConfig(**config)))


def _loaded(component: Component, build: Callable[[], Any]) -> Any:
    """Builds a module without memory and gives it its weights, tensor by tensor, in fp32."""
    try:
        with init_empty_weights(include_buffers=False):
            module = build()
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"{component.container.path} is damaged: its widths do not go together") from error
    shapes = {path: tuple(weight.shape) for path, weight in module.state_dict().items()}
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for path, shape in shapes.items():
        _require_fit(component, path, shape)
        by_key[component.key(path)].append(path)
    weights = {}
    for key, paths in by_key.items():
        stored = component.container.read(key)
        for path in paths:
            weight = component.cut(path, stored).to(torch.float32, copy=len(paths) > 1)
            weights[path] = weight.reshape(shapes[path]).contiguous()
    module.load_state_dict(weights, assign=True)
    return module.eval()


def _require_fit(component: Component, path: str, shape: tuple[int, ...]) -> None:
    """Checks a weight's shape, in which a linear layer is as good as a convolution of one pixel."""
    key, stored = component.key(path), component.shape(path)
    dtype = component.container.entries[key].dtype
    file = component.container.path
    if _without_ones(stored) != _without_ones(shape):
        raise ModelError(f"{file} is damaged or of an unknown structure: {key} is {stored}, and {shape} is expected")
    if not dtype.is_floating_point:
        raise ModelError(f"{file} holds {key} as {dtype}; give the checkpoint in fp16, bf16 or fp32")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape


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
