"""What a LoRA file says about where it comes from: its base, and the text encoder layer it learned with.

Metadata comes from strangers. It may choose between things that are already on this machine, and nothing else: it
starts no download, and what is printed of it goes through `printable`.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdlora.config_io import load_config
from sdlora.diffusion.schedule import PREDICTIONS
from sdlora.errors import ConfigError, ModelError
from sdlora.families import Base, hub, resolve_base
from sdlora.families.loading import ALIASES
from sdlora.families.pickles import is_pickle
from sdlora.files.webui import printable

if TYPE_CHECKING:
    from sdlora.files.kohya import LoraFile


def named_bases(lora: LoraFile) -> list[tuple[str, str]]:
    """Returns (where it is written, base) for every base that a LoRA file, or the run around it, names; best first."""
    keys = ("sdlora_base", "ss_sd_model_name")
    named = [(f"{key} in {printable(lora.path.name)}", lora.metadata.get(key, "")) for key in keys]
    folder = lora.path.absolute().parent
    config = (folder.parent if folder.name == "epochs" else folder) / "config.toml"
    if config.is_file():
        with suppress(ConfigError):  # then it is some other program's
            named.append((f"config.toml of the run of {printable(lora.path.name)}", load_config(config).base.model))
    return [(where, name) for where, name in named if name not in ("", "None", "auto")]  # None: kohya's "nothing"


def trained_base(lora: LoraFile, announce: Callable[[str], None] = print) -> tuple[Base, str]:
    """Returns the base that a LoRA was trained on, if it is on this machine, and where that is written.

    Args:
        lora: a LoRA file.
        announce: passed on to `resolve_base`.

    Raises:
        ConfigError: if the file names no base, or none that is here; says which to pass as --base.
    """
    named = named_bases(lora)
    for where, name in named:
        if _is_here(name):
            return resolve_base(name, announce), where
    file = printable(lora.path.name)
    if not named:
        raise ConfigError(f"{file} does not say which base it was trained on; pass --base, e.g. --base sd15")
    if pickled := next((name for _, name in named if _is_pickle_here(name)), None):
        raise ConfigError(
            f"{file} was trained on {printable(pickled)}, a pickle, and a LoRA's word is not enough to open one;\n"
            f"pass --base {printable(shlex.quote(pickled))} --allow-pickle if you trust it"
        )
    name = printable(named[0][1])
    raise ConfigError(
        f"{file} was trained on {name} ({named[0][0]}), which is not on this machine;\n"
        "pass --base with an alias, a hub id (it is downloaded then), a .safetensors file or a diffusers folder"
    )


def trained_clip_skip(lora: LoraFile) -> int:
    """Returns the text encoder layer, counted from the end, that a LoRA was trained with; 1 where it does not say."""
    text = lora.metadata.get("ss_clip_skip", "")
    return int(text) if re.fullmatch(r"[1-9]|1[0-2]", text) else 1


_FORCED = {"prediction": PREDICTIONS, "zero_snr": ("on", "off")}


def trained_schedule(lora: LoraFile) -> dict[str, str]:
    """Returns what was forced on the base's noise schedule in training: `prediction`, `zero_snr`, or neither."""
    try:
        base = tomllib.loads(lora.metadata.get("sdlora_config", ""))["base"]
        return {key: base[key] for key, legal in _FORCED.items() if base.get(key) in legal}
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError):
        return {}


def _is_here(name: str) -> bool:
    repository = ALIASES.get(name, name)
    if name == "nano" or (hub.looks_like_id(repository) and hub.cached(repository)):
        return True
    try:
        path = Path(name).expanduser()
        return (path / "model_index.json").is_file() or (path.suffix == ".safetensors" and path.is_file())
    except (OSError, RuntimeError, ValueError):  # names that are no paths
        return False


def _is_pickle_here(name: str) -> bool:
    try:
        path = Path(name).expanduser()
        return path.is_file() and is_pickle(path)
    except (OSError, RuntimeError, ValueError, ModelError):
        return False
