"""Where in a base model's files the weight lies that a LoRA module changes: headers only, no model is built.

With this a LoRA is merged into a checkpoint, or taken out of two, tensor by tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sdlora.container import Container, open_container
from sdlora.errors import ModelError
from sdlora.families.components import identify_folder
from sdlora.families.family import Family, TextEncoder
from sdlora.families.folders import component_weights
from sdlora.families.identify import identify_file
from sdlora.families.layout import Component, components
from sdlora.families.names import diffusers_unet
from sdlora.families.shapes import text_layers
from sdlora.families.table import FAMILIES

_CLIP_LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Place:
    """Where one layer's weight lies.

    Attributes:
        file: a .safetensors file.
        key: its key there.
        third: which third of the rows under that key is this layer's, 0 to 2; `None`: all of them.
        shape: of the layer's weight as it lies there, the third taken.
        transposed: whether it lies there as (in, out).
    """

    file: Path
    key: str
    third: int | None
    shape: tuple[int, ...]
    transposed: bool = False


def places(base: Path) -> tuple[Family, dict[str, Place]]:
    """Finds the weights of every layer of denoiser and text encoders that a LoRA can change.

    Args:
        base: a diffusers folder or a single file.

    Returns:
        The family, and the places by the layer's module name in a kohya file.

    Raises:
        ModelError: if the base is damaged, incomplete or not supported.
    """
    if base.is_file():
        family = FAMILIES[identify_file(base)]
        return family, _in_file(open_container(base, "base model", ModelError), family)
    family = FAMILIES[identify_folder(base)]
    return family, _in_folder(base, family)


def component_folder(base: Path, component: str) -> Path:
    """Returns where a diffusers folder keeps a component: `denoiser`, or a text encoder by its name."""
    return base / ("unet" if component == "denoiser" else component)


def _in_folder(folder: Path, family: Family) -> dict[str, Place]:
    found = {}
    for component in ("denoiser", *(spec.component for spec in family.text_encoders)):
        weights = component_weights(component_folder(folder, component))
        for key, container in weights.items():
            path, shape = key.removesuffix(".weight"), container.entries[key].shape
            if path != key and len(shape) in (2, 4) and ".embeddings." not in f".{path}":
                found[family.lora_key(component, path)] = Place(container.path, key, None, shape)
    return found


def _in_file(container: Container, family: Family) -> dict[str, Place]:
    found = components(container, family)
    weights = [name for name in found["denoiser"].section if name.endswith(".weight")]
    paths = {"denoiser": [path for name in weights if (path := diffusers_unet(name))]}
    for spec in family.text_encoders:
        if spec.component in found:
            paths[spec.component] = _text_encoder_paths(found[spec.component], spec)
    return {
        family.lora_key(component, path.removesuffix(".weight")): place
        for component in paths
        for path in paths[component]
        if len((place := _place(found[component], path)).shape) in (2, 4)
    }


def _text_encoder_paths(encoder: Component, spec: TextEncoder) -> list[str]:
    layers = range(text_layers(encoder, spec))
    paths = [f"encoder.layers.{i}.{layer}.weight" for i in layers for layer in _CLIP_LINEAR]
    return [path for path in [*paths, "text_projection.weight"] if path in encoder]


def _place(component: Component, path: str) -> Place:
    source, shape = component.found(path), component.stored_shape(path)
    return Place(component.container.path, component.key(path), source.third, shape, source.transposed)
