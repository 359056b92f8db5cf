"""A VAE or text encoders from elsewhere in place of the base's, wherever people keep them; checked to belong to it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from sdlora.container import Container, open_container
from sdlora.errors import ModelError
from sdlora.families.components import VAE_FACTOR, identify_folder, load_text_encoders, load_vae_folder
from sdlora.families.family import Family, TextEncoder
from sdlora.families.folders import read_json
from sdlora.families.identify import identify_container
from sdlora.families.latent_spaces import LATENT_SPACES, require_latents
from sdlora.families.layout import Component, Source, denoiser, text_encoder, vae
from sdlora.families.names import OLD_VAE_ATTENTION
from sdlora.families.single import load_text_encoder, load_vae
from sdlora.families.table import FAMILIES
from sdlora.families.tokenizers import clip_tokenizer
from sdlora.paths import expanded

LATENT_CHANNELS = 4


def replace_vae(source: str, family: Family) -> nn.Module:
    """Loads a VAE in fp32 on the CPU.

    Args:
        source: `taesd`, the small one of the family; a VAE folder of diffusers, or a base with one in `vae/`; or a
            file, in the original names or diffusers', alone or as part of a checkpoint.
        family: what the base is.

    Raises:
        ModelError: if there is none, it is damaged, or it is another family's, whose colours would be wrong.
    """
    scaling = family.vae_config["scaling_factor"]
    if source == "taesd":
        return LATENT_SPACES[scaling].load()
    path = expanded(source)
    if path.is_dir():
        module = _vae_from_folder(path, scaling)
    elif path.is_file():
        module = _vae_from_file(path, family)
    else:
        raise ModelError(f"no VAE {source!r}: it is no file, no folder and not the word taesd; check the path")
    factor = 2 ** (len(module.config.block_out_channels) - 1)
    if factor != VAE_FACTOR:
        raise ModelError(f"the VAE in {path} shrinks pictures {factor} times; {VAE_FACTOR} times is needed")
    require_latents(path, module, scaling)
    return module


def _vae_from_folder(folder: Path, scaling: float) -> Any:
    name = "" if (folder / "config.json").is_file() else "vae"
    if not (folder / name / "config.json").is_file():
        raise ModelError(f"{folder} holds no VAE: neither config.json nor vae/config.json is there")
    config = read_json(folder / name / "config.json")
    _require_channels(folder / name, config.get("latent_channels", LATENT_CHANNELS))
    tiny = config.get("_class_name") == "AutoencoderTiny"
    usual = 1.0 if tiny else 0.18215  # configurations from before SDXL do not name it
    found, wanted = config.get("scaling_factor", usual), 1.0 if tiny else scaling
    if found != wanted:
        whose = f", that of {LATENT_SPACES[found].title}" if found in LATENT_SPACES else ""
        raise ModelError(
            f"the VAE in {folder / name} has the scaling factor {found}{whose}; the base is "
            f"{LATENT_SPACES[scaling].title} and needs {wanted}"
        )
    return load_vae_folder(folder, name)


_TRAINING_KEYS = re.compile(r"(.*\.)?(loss|discriminator)\..*|model_ema\..*|global_step")
"""Keys in a VAE's file that the program which trained it left there."""

_TAESD_KEYS = re.compile(r"((en|de)coder\.layers\.)?1\.(weight|bias|conv\.0\.weight)")


def _vae_from_file(path: Path, family: Family) -> Any:
    container = open_container(path, "VAE", ModelError)
    if denoiser(container).section:
        other = FAMILIES[identify_container(container)]
        if other.vae_config["scaling_factor"] != family.vae_config["scaling_factor"]:
            raise ModelError(f"{path} is {other.title}, whose VAE does not fit the base, which is {family.title}")
    component = _vae_component(container)
    if "decoder.conv_in.weight" not in component:
        small = any(_TAESD_KEYS.fullmatch(key) for key in container.entries)
        hint = "; it looks like TAESD, and --vae taesd takes the right one, which comes with sdlora" if small else ""
        raise ModelError(f"{path} holds no VAE under the names of Stability's programs or diffusers{hint}")
    if "encoder.conv_in.weight" not in component:
        raise ModelError(f"{path} holds the decoder of a VAE only, and training needs the encoder; give a whole one")
    _require_channels(path, component.side("decoder.conv_in.weight", 1))
    module = load_vae(component, family)
    used = {component.key(name) for name in module.state_dict()}
    left = [key for name, key in component.section.items() if key not in used and not _TRAINING_KEYS.fullmatch(name)]
    if left:
        raise ModelError(
            f"{path}: its VAE has {len(left)} keys that are not known, e.g. {min(left)[:200]!r}; it is built in "
            "another way than Stable Diffusion's"
        )
    return module


def _vae_component(container: Container) -> Component:
    """Finds the VAE in a file under the original names or, in a file that holds nothing else, under diffusers'."""
    if not any(key.startswith("decoder.up_blocks.") for key in container.entries):
        return vae(container)
    section = {key: key for key in container.entries}
    dated = "decoder.mid_block.attentions.0.query.weight" in section

    def source(path: str) -> Source:
        for old, new in OLD_VAE_ATTENTION.items() if dated else ():
            path = path.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        return Source(path)

    return Component(container, section, source)


def _require_channels(path: Path, channels: int) -> None:
    if channels != LATENT_CHANNELS:
        whose = " as in Stable Diffusion 3 and Flux" if channels == 16 else ""
        raise ModelError(
            f"the VAE in {path} has {channels} latent channels{whose}; Stable Diffusion 1.x, 2.x and XL have "
            f"{LATENT_CHANNELS}"
        )


def replace_text_encoders(source: str, family: Family) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Loads text encoders in fp32 on the CPU, and their tokenizers.

    Args:
        source: a diffusers folder of the same family, or a single file that holds them all; for a family with one
            encoder also a file with nothing else in it.
        family: what the base is.

    Returns:
        The encoders, and the tokenizers, both by component name.

    Raises:
        ModelError: if one is missing or damaged, or they are another family's.
    """
    path = expanded(source)
    if path.is_dir():
        return _encoders_from_folder(path, family)
    if path.is_file():
        return _encoders_from_file(path, family)
    raise ModelError(f"no text encoders {source!r}: it is no file and no folder; check the path")


def _encoders_from_folder(folder: Path, family: Family) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    if (folder / "model_index.json").is_file():
        other = FAMILIES[identify_folder(folder)]
        if other.name != family.name:
            raise ModelError(f"{folder} is {other.title}, whose text encoders do not fit the base, {family.title}")
    names = [spec.component for spec in family.text_encoders]
    absent = [name for name in names if not (folder / name).is_dir()]
    if absent:
        raise ModelError(f"{folder} has no {'/ and no '.join(absent)}/ folder; {family.title} needs {', '.join(names)}")
    found = load_text_encoders(folder, family, names)
    return {name: encoder for name, (encoder, _) in found.items()}, {name: words for name, (_, words) in found.items()}


def _encoders_from_file(path: Path, family: Family) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    container = open_container(path, "text encoders", ModelError)
    found = {spec.component: _encoder_component(container, spec, family) for spec in family.text_encoders}
    absent = [name for name, component in found.items() if not component.section]
    if absent:
        others = [f for f in FAMILIES.values() if all(text_encoder(container, s).section for s in f.text_encoders)]
        hint = f"; it holds those of {others[0].title}" if others else ""
        names = " and no ".join(absent).replace("_", " ")
        raise ModelError(f"{path} holds no {names} of {family.title}{hint}")
    encoders = {spec.component: load_text_encoder(found[spec.component], spec) for spec in family.text_encoders}
    return encoders, {spec.component: clip_tokenizer(spec.pad) for spec in family.text_encoders}


def _encoder_component(container: Container, spec: TextEncoder, family: Family) -> Component:
    """Finds an encoder behind its prefix or, if it is the only one of its family, without any."""
    component = text_encoder(container, spec)
    if component.section or len(family.text_encoders) > 1:
        return component
    bare = text_encoder(container, replace(spec, original=""))
    return bare if "embeddings.token_embedding.weight" in bare else component
