"""LoRA files as diffusers and peft write them: layers under their own paths, ranks and alphas in a configuration.

These formats have no alpha beside the factors. Whoever writes only the factors has changed the LoRA's strength; so the
configuration, which both programs read, is written with every file.

Source: diffusers' `loaders/lora_base.py`; peft's `utils/save_and_load.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.atomic import write_bytes, write_text
from sdlora.container import serialize
from sdlora.errors import LoraFileError
from sdlora.files.kohya import ModuleWeights, cast
from sdlora.files.layers import layers_of
from sdlora.files.peft_config import CONFIG_NAME, METADATA_KEY, config_table
from sdlora.files.webui import printable

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
PEFT_NAME = "adapter_model.safetensors"

COMPONENTS = {"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
"""What both programs call the components."""

Weights = dict[str, ModuleWeights]
"""A model's modules by the paths of their layers."""

_LEVEL = "text_model."
"""A level of text encoders that CLIPTextModel has lost in transformers 5."""


def write_diffusers(
    path: Path,
    modules: Mapping[str, ModuleWeights],
    family_name: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> Path:
    """Writes modules as a file that diffusers' `load_lora_weights` takes, at the right strength.

    Args:
        path: the file; or a folder, in which it gets the name that diffusers looks for.
        modules: weights by module name, on the CPU.
        family_name: the base that they are for, a key of `FAMILIES`.
        metadata: texts; the configuration is added, or replaced.
        dtype: torch.float16, torch.bfloat16 or torch.float32.

    Returns:
        The file; replaced if it exists.

    Raises:
        LoraFileError: if a module is no layer of that base, or a value does not fit into `dtype`.
        TrainingError: if the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for component, weights in by_component(modules, family_name).items():
        old = {(_LEVEL if p.startswith("encoder.") else "") + p: module for p, module in weights.items()}
        tensors |= _tensors(old if component != "unet" else weights, f"{component}.", dtype)
        table |= {f"{component}.{key}": value for key, value in _config(weights).items()}
    file = path if path.suffix.lower() == ".safetensors" else path / DIFFUSERS_NAME
    described = {**metadata, "format": "pt", METADATA_KEY: json.dumps(table, sort_keys=True)}
    write_bytes(file, serialize(tensors, described))
    return file


def write_peft(
    folder: Path,
    modules: Mapping[str, ModuleWeights],
    family_name: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> list[Path]:
    """Writes modules as folders that peft's `PeftModel.from_pretrained` takes, one for each component.

    Layers are called as the installed version of transformers calls them: `CLIPTextModel` lost a level with version 5,
    and peft finds no layer by its old name.

    Args:
        folder: gets `unet/`, `text_encoder/` and `text_encoder_2/`, as far as they have modules.
        modules: weights by module name, on the CPU.
        family_name: the base that they are for, a key of `FAMILIES`.
        metadata: texts for every file.
        dtype: torch.float16, torch.bfloat16 or torch.float32.

    Returns:
        The files written; replaced if they exist.

    Raises:
        LoraFileError: if a module is no layer of that base, or a value does not fit into `dtype`.
        TrainingError: if the disk is full or the folder cannot be written.
    """
    written = []
    for component, weights in by_component(modules, family_name).items():
        tensors = _tensors(weights, "base_model.model.", dtype)
        config, file = folder / component / CONFIG_NAME, folder / component / PEFT_NAME
        write_text(config, json.dumps(_config(weights), indent=2, sort_keys=True) + "\n")
        write_bytes(file, serialize(tensors, {**metadata, "format": "pt"}))
        written += [config, file]
    return written


def by_component(modules: Mapping[str, ModuleWeights], family_name: str) -> dict[str, Weights]:
    """Sorts modules by component and path, in the shapes of their layers.

    A 1 x 1 convolution may have been written as a matrix, or a matrix as a 1 x 1 convolution.

    Args:
        modules: weights by canonical module name.
        family_name: the base that they are for, a key of `FAMILIES`.

    Raises:
        LoraFileError: if a module is no layer of that base.
    """
    layers = layers_of(family_name)
    lost = [name for name in modules if name not in layers]
    if lost:
        raise LoraFileError(
            f"cannot write a LoRA for {family_name}: {len(lost)} of its {len(modules)} modules are no layers of that "
            f"base, the first is {printable(lost[0], 120)}"
        )
    sorted_: dict[str, Weights] = {}
    for name, weights in modules.items():
        layer = layers[name]
        sorted_.setdefault(COMPONENTS[layer.component], {})[layer.path] = fitted(weights, len(layer.shape))
    return sorted_


def fitted(weights: ModuleWeights, sides: int) -> ModuleWeights:
    """Returns a module with as many sides as its layer's weight has; only a 1 x 1 kernel comes or goes."""
    down, up = weights.down, weights.up
    if down.dim() == sides or any(side != 1 for side in down.shape[2:]):
        return weights
    ones = (1,) * (sides - 2)
    return ModuleWeights(down.reshape(*down.shape[:2], *ones), up.reshape(*up.shape[:2], *ones), weights.alpha)


def _tensors(weights: Weights, start: str, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for path, module in weights.items():
        for factor, value in (("lora_A", module.down), ("lora_B", module.up)):
            key = f"{start}{path}.{factor}.weight"
            tensors[key] = cast(key, value, dtype)
    return tensors


def _config(weights: Weights) -> dict[str, Any]:
    """Returns peft's settings; it goes by the ends of paths, so that they fit with that level and without."""
    by_end = {path.removeprefix(_LEVEL): module for path, module in weights.items()}
    return config_table({p: m.rank for p, m in by_end.items()}, {p: m.alpha for p, m in by_end.items()})
