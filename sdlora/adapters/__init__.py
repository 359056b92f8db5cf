"""The trainable change to frozen layers. Independent of diffusion; works in any torch model."""

from sdlora.adapters.adapter import Adapter
from sdlora.adapters.inject import Target, adapters_in, eject, find_layers, inject, merge, strength
from sdlora.adapters.lora import Lora

__all__ = ["Adapter", "Lora", "Target", "adapters_in", "eject", "find_layers", "inject", "merge", "strength"]
