"""From what the user wrote behind `--base` to loaded parts.

Nothing is fetched unless the user named something remote, or `auto` chose Stable Diffusion 1.5 for a GPU; the size is
announced first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdlora.config import BaseSection
from sdlora.diffusion.schedule import Schedule
from sdlora.errors import ModelError
from sdlora.families import hub
from sdlora.families.components import (
    VAE_FACTOR,
    Components,
    folder_resolution,
    folder_width,
    identify_folder,
    load_folder,
)
from sdlora.families.family import Family, Parts
from sdlora.families.pickles import readable
from sdlora.families.replacements import replace_text_encoders, replace_vae
from sdlora.families.single import file_resolution, file_width, identify_file, load_file
from sdlora.families.table import FAMILIES
from sdlora.paths import expanded
from sdlora.weights import moved

NANO = Path(__file__).parent.parent / "nano"
FULL_WIDTH = 320  # channels; the narrowest block of SD 1.5
USUAL_CFG, MINIATURE_CFG = 5.0, 1.5
_HIGHEST = 2  # an eos_token_id that makes transformers look for the highest token, as old configurations want
ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}


@dataclass(frozen=True)
class Base:
    """A base model on this machine.

    Attributes:
        name: what the user calls it: an alias, a hub id, or a path as it was written.
        path: a diffusers folder, or a single file.
        reason: why it was chosen; one clause for the person at the terminal.
    """

    name: str
    path: Path
    reason: str


def resolve_base(
    model: str,
    announce: Callable[[str], None] = print,
    revision: str | None = None,
    *,
    allow_pickle: bool = False,
    cache_dir: Path | None = None,
) -> Base:
    """Finds a base model and, if it is remote and not in the hub cache, fetches it.

    Args:
        model: `auto`, an alias, a diffusers folder, a .safetensors file or a hub id.
        announce: told about a download or a conversion, with its size, before it begins.
        revision: branch, tag or commit on the hub.
        allow_pickle: whether a pickled checkpoint is converted; otherwise it is refused.
        cache_dir: the user's cache folder, where converted checkpoints are kept; needed with `allow_pickle`.

    Raises:
        ModelError: if there is no such model, the hub cannot be reached, it is a pickle, or a revision is asked of
            what is not on the hub.
    """
    path = expanded(model)
    if revision is not None and (model in ("auto", "nano") or os.path.exists(path)):
        raise ModelError(
            f"--revision {revision} has no effect: the base {model} is not taken from the hub; leave it out"
        )
    if model == "auto":
        return _automatic(announce)
    if model == "nano":
        return Base("nano", NANO, "embedded in sdlora")
    if os.path.isdir(path):  # Path's own methods raise errors for names that are too long
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{model} is a folder without model_index.json; a base is a diffusers folder or one .safetensors file"
            )
        return Base(model, path, "a diffusers folder")
    if os.path.isfile(path):
        file = readable(path, cache_dir if allow_pickle else None, announce)
        return Base(model, file, "a single file" if file == path else "converted from a pickle")
    repository = ALIASES.get(model, model)
    if not hub.looks_like_id(repository):
        known = ", ".join(["auto", "nano", *ALIASES])
        raise ModelError(f"no base model {model!r}: it is no file, no folder, no hub id (owner/name), none of {known}")
    cached = hub.cached(repository, revision)
    if cached:
        return Base(model, cached, "found in the hub cache")
    return Base(model, hub.download(repository, announce, revision), "downloaded from the hub")


def _automatic(announce: Callable[[str], None]) -> Base:
    repository = ALIASES["sd15"]
    cached = hub.cached(repository)
    if cached:
        return Base("sd15", cached, "Stable Diffusion 1.5 is in the hub cache")
    if torch.cuda.is_available():
        return Base("sd15", hub.download(repository, announce), f"there is a GPU ({torch.cuda.get_device_name()})")
    return Base("nano", NANO, "no GPU, and Stable Diffusion 1.5 is not in the hub cache; --base sd15 would download it")


def identify(path: Path, expected: str = "auto") -> Family:
    """Tells the family of a base model from its configuration files, or from the names and shapes in a single file.

    Args:
        path: a diffusers folder or a single file.
        expected: the family that the user says it is, or "auto".

    Raises:
        ModelError: if the family is not supported, or is not the expected one.
    """
    family = FAMILIES[identify_file(path) if path.is_file() else identify_folder(path)]
    if expected not in ("auto", family.name):
        raise ModelError(f"{path} is {family.title} ({family.name}), not {expected}; leave --family out")
    return family


def native_resolution(path: Path) -> int:
    """Returns the side in pixels of the square pictures that a base was trained on; reads no weights.

    Raises:
        ModelError: if its configuration is missing or damaged.
    """
    return file_resolution(path, identify(path)) if path.is_file() else folder_resolution(path)


def native_width(path: Path) -> int:
    """Returns the channels of the first block of a base's denoiser, 320 at full size; reads no weights.

    Raises:
        ModelError: if its configuration is missing or damaged.
    """
    return file_width(path) if path.is_file() else folder_width(path)


def native_cfg(path: Path) -> float:
    """Returns the CFG scale with which a base is to draw unless the user says another; reads no weights.

    The embedded miniature and its like want little: at 4 their LoRAs lose a quarter of the style that they have at 1.5
    (docs/defaults.md).

    Raises:
        ModelError: if its configuration is missing or damaged.
    """
    return MINIATURE_CFG if native_width(path) < FULL_WIDTH else USUAL_CFG


def load_parts(
    base: Base,
    settings: BaseSection | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Parts:
    """Loads a base model. Each weight is read once and cast by itself, so there are never two models in memory.

    Args:
        base: what `resolve_base` found.
        settings: what the user wants otherwise: family, prediction type, VAE, text encoders. Default: nothing.
        device: where it shall be.
        dtype: number format of denoiser and text encoders; the VAE is always fp32, see `Parts.to`.
        **changes: single settings by name.

    Raises:
        ModelError: if it is incomplete, damaged, or of a family that is not supported or not the expected one.
    """
    settings = (settings or BaseSection()).model_copy(update=changes)
    family = identify(base.path, settings.family)
    wanted = {"vae", *(spec.component for spec in family.text_encoders)}
    if settings.vae:
        wanted -= {"vae"}
    if settings.text_encoders:
        wanted = {"vae"} & wanted
    others = replace_text_encoders(settings.text_encoders, family) if settings.text_encoders else None
    if base.path.is_file():
        width = _pooled_width(family, others[0]) if others else None
        components = load_file(base.path, family, wanted, width, device, dtype)
    else:
        components = load_folder(base.path, family, wanted, device, dtype)
    if settings.vae:
        components.vae = moved(replace_vae(settings.vae, family), device, torch.float32)
    if others:
        encoders, components.tokenizers = others
        components.text_encoders = {name: moved(encoder, device, dtype) for name, encoder in encoders.items()}
    parts = _put_together(base, family, components, settings)
    parts.schedule = parts.schedule.to(device)
    return parts


def _pooled_width(family: Family, encoders: dict[str, Any]) -> int | None:
    return next((encoders[spec.component].config.projection_dim for spec in family.text_encoders if spec.pooled), None)


def _put_together(base: Base, family: Family, components: Components, settings: BaseSection) -> Parts:
    missing = [s.component for s in family.text_encoders if s.component not in components.text_encoders]
    if components.vae is None:
        raise ModelError(f"{base.name} holds no VAE; give one with --vae: a file, a folder, or taesd")
    if missing:
        raise ModelError(
            f"{base.name} holds no {' and no '.join(missing).replace('_', ' ')}; give them with --text-encoders: a "
            "diffusers folder, or a single file that holds them"
        )
    vae: Any = components.vae
    vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if vae_factor != VAE_FACTOR:
        raise ModelError(f"the VAE of {base.name} shrinks pictures {vae_factor} times; {VAE_FACTOR} times is needed")
    config = dict(components.scheduler_config)
    if settings.zero_snr != "auto":
        config["rescale_betas_zero_snr"] = settings.zero_snr == "on"
    try:
        schedule = Schedule.from_config(config, settings.prediction)
    except ValueError as error:
        raise ModelError(f"{base.path}: {error}") from error
    _require_widths(base, family, components)
    _require_end_marks(base, family, components)
    for module in (components.denoiser, vae, *components.text_encoders.values()):
        module.requires_grad_(False).eval()
    return Parts(
        family=family,
        name=base.name,
        denoiser=components.denoiser,
        vae=vae,
        text_encoders=components.text_encoders,
        tokenizers=components.tokenizers,
        schedule=schedule,
        scheduler_config={**config, "prediction_type": schedule.prediction},
        resolution=components.resolution,
        vae_factor=VAE_FACTOR,
        notes=[*components.notes, *_schedule_notes(base, config, schedule)],
    )


def _schedule_notes(base: Base, config: dict[str, Any], schedule: Schedule) -> list[str]:
    """Says where prediction and noise do not go together. Source: Lin et al. 2023, arXiv:2305.08891, section 3.2."""
    if schedule.prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        return [
            f"{base.name} predicts the noise (epsilon) and its last timestep is pure noise (zero terminal SNR), where "
            "that teaches nothing; such bases predict v: --prediction v_prediction or --zero-snr off sets one of both"
        ]
    return []


def _require_widths(base: Base, family: Family, components: Components) -> None:
    """Checks that the text encoders are as wide as the denoiser wants, which replaced ones may not be."""
    denoiser: Any = components.denoiser
    encoders: list[Any] = [components.text_encoders[s.component] for s in family.text_encoders]
    width, wanted = sum(e.config.hidden_size for e in encoders), denoiser.config.cross_attention_dim
    if width != wanted:
        raise ModelError(
            f"the text encoders of {base.name} give {width} numbers a token and its denoiser takes {wanted}; they do "
            "not belong together"
        )
    pooled = _pooled_width(family, components.text_encoders)
    if pooled is not None:
        total, each = denoiser.config.projection_class_embeddings_input_dim, denoiser.config.addition_time_embed_dim
        if pooled + 6 * each != total:
            raise ModelError(
                f"the text encoders of {base.name} give a pooled text of {pooled} numbers and its denoiser takes "
                f"{total - 6 * each}; they do not belong together"
            )


def _require_end_marks(base: Base, family: Family, components: Components) -> None:
    """Checks that an encoder which pools a text finds its end; if not, transformers takes the start without a word."""
    for spec in family.text_encoders:
        encoder: Any = components.text_encoders[spec.component]
        end = components.tokenizers[spec.component].eos_token_id
        if spec.pooled and encoder.config.eos_token_id not in (_HIGHEST, end):
            raise ModelError(
                f"the {spec.component.replace('_', ' ')} of {base.name} looks for the end of a text at token "
                f"{encoder.config.eos_token_id}, and its tokenizer ends texts with {end}; one of the two is another "
                "model's"
            )
