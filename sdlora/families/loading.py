"""From what the user wrote behind `--base` to loaded parts.

Nothing is fetched unless the user named something remote, or `auto` chose Stable Diffusion 1.5 for a GPU; the size is
announced first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.errors import ModelError
from sdlora.families import hub
from sdlora.families.family import Family, Parts
from sdlora.families.folders import read_json
from sdlora.families.sd1 import SD1

FAMILIES: dict[str, Family] = {"sd1": SD1}

NANO = Path(__file__).parent.parent / "nano"
ALIASES = {"sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5"}


@dataclass(frozen=True)
class Base:
    """A base model on this machine.

    Attributes:
        name: what the user calls it: an alias, a hub id, or a folder as it was written.
        folder: where it lies.
        reason: why it was chosen; one clause for the person at the terminal.
    """

    name: str
    folder: Path
    reason: str


def resolve_base(model: str, announce: Callable[[str], None] = print) -> Base:
    """Finds a base model and, if it is remote and not in the hub cache, fetches it.

    Args:
        model: `auto`, an alias, a diffusers folder or a hub id.
        announce: told about a download, with its size, before it begins.

    Raises:
        ModelError: if there is no such model, or the hub cannot be reached.
    """
    if model == "auto":
        return _automatic(announce)
    if model == "nano":
        return Base("nano", NANO, "embedded in sdlora")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{model} is a folder without model_index.json; a base is a diffusers folder, see README.md"
            )
        return Base(model, folder, "a diffusers folder")
    if folder.is_file():
        raise ModelError(f"{model} is a single file; this version reads diffusers folders and hub ids only")
    repository = ALIASES.get(model, model)
    if not hub.looks_like_id(repository):
        known = ", ".join(["auto", "nano", *ALIASES])
        raise ModelError(f"no base model {model!r}: it is no folder, no hub id (owner/name) and none of {known}")
    cached = hub.cached(repository)
    if cached:
        return Base(model, cached, "found in the hub cache")
    return Base(model, hub.download(repository, announce), "downloaded from the hub")


def _automatic(announce: Callable[[str], None]) -> Base:
    repository = ALIASES["sd15"]
    cached = hub.cached(repository)
    if cached:
        return Base("sd15", cached, "Stable Diffusion 1.5 is in the hub cache")
    if torch.cuda.is_available():
        return Base("sd15", hub.download(repository, announce), f"there is a GPU ({torch.cuda.get_device_name()})")
    return Base("nano", NANO, "no GPU, and Stable Diffusion 1.5 is not in the hub cache; --base sd15 would download it")


def identify(folder: Path) -> Family:
    """Tells the family of a diffusers folder from its configuration files.

    Raises:
        ModelError: if the family is not supported.
    """
    index = read_json(folder / "model_index.json")
    if "text_encoder_2" in index or "transformer" in index:
        raise ModelError(f"{folder} is a {index.get('_class_name', 'model')}; this version trains SD 1.x only")
    unet = read_json(folder / "unet" / "config.json")
    if unet.get("use_linear_projection"):
        raise ModelError(f"{folder} is Stable Diffusion 2.x; this version trains SD 1.x only")
    if unet.get("in_channels", 4) != 4:
        raise ModelError(f"{folder} has {unet['in_channels']} input channels (an inpainting model?); 4 are needed")
    return SD1


def load_parts(base: Base, *, prediction: str = "auto") -> Parts:
    """Loads a base model in fp32 on the CPU.

    Raises:
        ModelError: if it is incomplete, damaged or of an unsupported family.
    """
    parts = identify(base.folder).load(base.folder, prediction)
    parts.name = base.name
    return parts
