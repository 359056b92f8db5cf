"""Layers that never train, stored and multiplied in the way that suits the machine. Independent of diffusion."""

from sdlora.frozen.layer import Frozen, freeze_layers, product, pull

__all__ = ["Frozen", "freeze_layers", "product", "pull"]
