"""Reading the parts of a diffusers folder. Safetensors only, nothing is fetched, no code from the folder runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from sdlora.container import Container, open_container
from sdlora.errors import ModelError
from sdlora.families.names import OLD_VAE_ATTENTION
from sdlora.weights import Weight, assemble

_VARIANTS = ("", ".fp16")
_STEMS = ("diffusion_pytorch_model", "model")
_OLD_VAE_LAYERS = [(f".attentions.0.{new}.", f".attentions.0.{old}.") for old, new in OLD_VAE_ATTENTION.items()]


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


def component_weights(folder: Path) -> dict[str, Container]:
    """Finds the weights of one component of a diffusers folder, in one file or several: key -> its file.

    Raises:
        ModelError: if there are none, a file is damaged, or an index names what is not there.
    """
    variant = weights_variant(folder)
    if variant is None:
        raise ModelError(f"{folder} holds no .safetensors weights")
    part = f".{variant}" if variant else ""
    for stem in _STEMS:
        file = folder / f"{stem}{part}.safetensors"
        if file.is_file():
            container = open_container(file, "weights", ModelError)
            return dict.fromkeys(container.entries, container)
        for index in (f"{stem}{part}.safetensors.index.json", f"{stem}.safetensors.index{part}.json"):
            if (folder / index).is_file():
                return _shards(folder / index)
    raise ModelError(f"{folder} holds no .safetensors weights of a usual name")


def _shards(index: Path) -> dict[str, Container]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ModelError(f"{index} does not say which weight is in which file; download it again")
    outside = next((name for name in table.values() if Path(name).name != name), None)
    if outside is not None:
        raise ModelError(f"{index} points outside its folder, at {outside[:200]!r}; it is not read")
    files = {name: open_container(index.parent / name, "weights", ModelError) for name in sorted(set(table.values()))}
    for key, name in table.items():
        if key not in files[name].entries:
            raise ModelError(f"{index} says that {key[:200]!r} is in {name}, where it is not; download it again")
    return {key: files[name] for key, name in table.items()}


def load_component(
    cls: Any, folder: Path, name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Any:
    """Loads `folder/name` with a diffusers or transformers class.

    Args:
        cls: a model's class, or a tokenizer's.
        folder: a diffusers folder.
        name: of the folder in it.
        device: where a model shall be.
        dtype: in which number format.

    Raises:
        ModelError: if it is missing, damaged, incomplete, quantised, or has weights in pickle files only.
    """
    place = folder / name
    if not place.is_dir():
        raise ModelError(f"the base model {folder} is incomplete: it has no {name}/ folder")
    try:
        with quiet():
            if not hasattr(cls, "load_state_dict"):
                return cls.from_pretrained(place, local_files_only=True)
            build = _builder(cls, place)
    except Exception as error:  # the libraries raise a dozen kinds for a damaged folder
        raise ModelError(f"cannot load {place}: {_first_line(error)}") from error
    if weights_variant(place) is None:
        pickles = [p.name for p in place.glob("*.bin")] + [p.name for p in place.glob("*.ckpt")]
        hint = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise ModelError(f"{place} holds no .safetensors weights{hint}")
    found = component_weights(place)

    def weight(path: str) -> Weight:
        key = next((key for key in _spellings(path) if key in found), None)
        if key is None:  # the libraries would leave it at random
            raise ModelError(f"{place} is incomplete: its weights lack {path}; download it again")
        return Weight(found[key], key)

    with quiet():
        return assemble(build, weight, place, device, dtype)


def _builder(cls: Any, place: Path) -> Callable[[], Any]:
    """Reads a model's configuration; returns what builds the model."""
    if "quantization_config" in read_json(place / "config.json"):
        raise ModelError("it is quantised; give it in fp16, bf16 or fp32")
    if cls.__module__.startswith("transformers"):
        config = cls.config_class.from_pretrained(place, local_files_only=True)
        return lambda: cls(config)
    config = cls.load_config(place, local_files_only=True)
    return lambda: cls.from_config(config)


def _spellings(path: str) -> Iterator[str]:
    """Yields the names under which a weight was stored by this and by older versions of the libraries."""
    yield path
    yield f"text_model.{path}"  # transformers up to 4
    yield path.removeprefix("text_model.")
    for new, old in _OLD_VAE_LAYERS:
        if new in path:
            yield path.replace(new, old)


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
