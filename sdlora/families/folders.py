"""Reading the parts of a diffusers folder. Safetensors only, nothing is fetched, no code from the folder runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from sdlora.errors import ModelError

_VARIANTS = ("", ".fp16")
_STEMS = ("diffusion_pytorch_model", "model")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: if the file is missing or is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"the base model is incomplete: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object, found a {type(value).__name__}")
    return value


def weights_variant(folder: Path) -> str | None:
    """Returns which weights a component folder holds: `""` for the plain file, `"fp16"`, or `None` for none."""
    for variant in _VARIANTS:
        for stem in _STEMS:
            if (
                list(folder.glob(f"{stem}{variant}.safetensors"))
                or list(folder.glob(f"{stem}{variant}.safetensors.index.json"))
                or list(folder.glob(f"{stem}.safetensors.index{variant}.json"))
            ):
                return variant.removeprefix(".")
    return None


def load_component(cls: Any, folder: Path, name: str) -> Any:
    """Loads `folder/name` with a diffusers or transformers class, in fp32.

    Raises:
        ModelError: if it is missing, damaged, incomplete, or has weights in pickle files only.
    """
    place = folder / name
    if not place.is_dir():
        raise ModelError(f"the base model {folder} is incomplete: it has no {name}/ folder")
    options: dict[str, Any] = {"local_files_only": True}
    if hasattr(cls, "load_state_dict"):
        variant = weights_variant(place)
        if variant is None:
            pickles = [p.name for p in place.glob("*.bin")] + [p.name for p in place.glob("*.ckpt")]
            hint = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
            raise ModelError(f"{place} holds no .safetensors weights{hint}")
        options |= {"use_safetensors": True, "variant": variant or None}
        options["dtype" if cls.__module__.startswith("transformers") else "torch_dtype"] = torch.float32
        options["output_loading_info"] = True
    try:
        with quiet():
            loaded = cls.from_pretrained(place, **options)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise ModelError(f"cannot load {place}: {_first_line(error)}") from error
    if "output_loading_info" not in options:
        return loaded
    model, info = loaded
    if lost := sorted(info["missing_keys"]):  # the libraries would leave them at random
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise ModelError(f"{place} is incomplete: its weights lack {lost[0]}{more}; download it again")
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' progress bars and advice off the terminal in a `with` block; their errors still raise."""
    bar, loud = transformers_logging.is_progress_bar_enabled(), diffusers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(loud)
        if bar:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
