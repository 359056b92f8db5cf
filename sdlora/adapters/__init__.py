"""The trainable change to frozen layers. Independent of diffusion; works in any torch model."""

from sdlora.adapters.adapter import Adapter
from sdlora.adapters.flat import FlatParameters
from sdlora.adapters.inject import Target, adapters_in, eject, find_layers, inject, merge, merged, strength
from sdlora.adapters.lora import Lora

__all__ = [
    "Adapter",
    "FlatParameters",
    "Lora",
    "Target",
    "adapters_in",
    "eject",
    "find_layers",
    "inject",
    "merge",
    "merged",
    "strength",
]
