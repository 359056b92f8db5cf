"""What a LoRA file is held against: every layer of a base that a LoRA can change, by place, with its weight's shape.

Places are diffusers' and transformers' paths. Each program calls the same layers by names of its own; those are derived
from the places in the program's own file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from torch import nn

from sdlora.adapters import Adapter, Target, find_layers
from sdlora.errors import LoraFileError
from sdlora.families.names import original_unet

if TYPE_CHECKING:
    from sdlora.families import Family, Parts

Shape = tuple[int, ...]

Place = tuple[str, str]
"""Component and path, e.g. ("denoiser", "mid_block.attentions.0.proj_in")."""

KINDS = {768: "SD1", 1024: "SD2", 2048: "SDXL"}
"""The bases that the programs know, by the width of the text states, in the WebUIs' words. Source: InvokeAI's probe."""

_ALL = (Target(layers=("Linear", "Conv2d")),)


@dataclass(frozen=True)
class Layout:
    """The layers of one base.

    Attributes:
        family: the kind of model.
        components: component -> path -> shape of the weight. Text encoders' paths have no `text_model.` in front,
            whatever transformers does.
    """

    family: Family
    components: Mapping[str, Mapping[str, Shape]]

    @property
    def denoiser(self) -> Mapping[str, Shape]:
        """Layers of the denoiser."""
        return self.components["denoiser"]

    def shape(self, place: Place) -> Shape | None:
        """Returns the shape of a layer's weight, or `None` if this layout does not list it."""
        component, path = place
        return self.components.get(component, {}).get(path)

    @cached_property
    def text_width(self) -> int | None:
        """Width of the text states that the denoiser attends to."""
        return next((shape[1] for path, shape in self.denoiser.items() if path.endswith("attn2.to_k")), None)

    @property
    def kind(self) -> str | None:
        """SD1, SD2 or SDXL; `None` for a base that only diffusers and sdlora can load, such as nano."""
        return KINDS.get(self.text_width or 0)

    @cached_property
    def originals(self) -> Mapping[str, str]:
        """The original names of the denoiser's layers, by path."""
        plain_up = self.family.plain_up
        return {path: name for path in self.denoiser if (name := original_unet(path, plain_up=plain_up))}


def flat(path: str) -> str:
    """Returns a path as the modules of kohya's files are named: every dot an underscore."""
    return path.replace(".", "_")


def layout_of(parts: Parts) -> Layout:
    """Returns the layout of a loaded base; adapters may be in place."""
    return layout_of_models(parts.family, parts.components)


@cache
def layout_for(name: str) -> Layout:
    """Returns the layout of a family's bases at their real size.

    Args:
        name: a key of `FAMILIES`, or "nano" for the embedded base.

    Raises:
        LoraFileError: if there is no such base.
    """
    from sdlora.families import FAMILIES, load_parts, resolve_base
    from sdlora.families.full_size import full_size_models

    if name == "nano":
        return layout_of(load_parts(resolve_base(name)))
    if name not in FAMILIES:
        raise LoraFileError(f"no base is known for {name!r}; name one with --base")
    return layout_of_models(FAMILIES[name], full_size_models(FAMILIES[name]))


def layout_of_models(family: Family, models: Mapping[str, nn.Module]) -> Layout:
    """Returns the layout of models by component name."""
    components: dict[str, dict[str, Shape]] = {}
    for component, model in models.items():
        layers = components.setdefault(component, {})
        for path, module in find_layers(model, _ALL).items():
            while isinstance(module, Adapter):
                module = module.layer
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            layers[path.removeprefix("text_model.")] = tuple(weight.shape)
    return Layout(family, components)


def same_product(layer: Shape, down: Shape, up: Shape) -> bool:
    """Tells whether up times down, both flattened to matrices, has as many numbers as the layer's weight.

    Args:
        layer: [out, in] or [out, in, kh, kw].
        down: of a LoRA, [r, in] or [r, in, kh, kw].
        up: [out, r] or [out, r, 1, 1].
    """
    inner = math.prod(up[1:])
    return inner == down[0] and up[0] == layer[0] and math.prod(down[1:]) == math.prod(layer[1:])


def same_shape(layer: Shape, down: Shape, up: Shape) -> bool:
    """Tells whether the factors have just the shapes that a LoRA of this layer has in peft; see `same_product`."""
    return down == (down[0], *layer[1:]) and up == (layer[0], down[0], *[1 for _ in layer[2:]])
