"""Every layer of a full-size model that a LoRA can change, by the name that files give it.

A name in a file has lost its dots, and they cannot be put back by rule: `to_out_0` is `to_out.0`, `proj_out` is not
`proj.out`. So the names are made from the layers, once, and looked up.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        component: `denoiser`, `text_encoder` or `text_encoder_2`.
        path: in its model, as the installed versions of diffusers and transformers build it.
        shape: of its weight at full size.
    """

    component: str
    path: str
    shape: tuple[int, ...]


@functools.cache
def layers_of(family_name: str) -> dict[str, Layer]:
    """Returns the layers of a family's models by their names in LoRA files.

    Args:
        family_name: a key of `FAMILIES`.
    """
    from sdlora.adapters import Target, find_layers
    from sdlora.families import FAMILIES
    from sdlora.families.full_size import full_size_models

    family = FAMILIES[family_name]
    layers = {}
    for component, model in full_size_models(family).items():
        for path, module in find_layers(model, (Target(layers=("Linear", "Conv2d")),)).items():
            layer: Any = module
            layers[family.lora_key(component, path)] = Layer(component, path, tuple(layer.weight.shape))
    return layers
