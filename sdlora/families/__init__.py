"""Base models: what they are, how to find and load them. Never an `if family`: a family is data and functions."""

from sdlora.families.family import Conditioning, Family, Parts
from sdlora.families.loading import FAMILIES, Base, identify, load_parts, resolve_base

__all__ = ["FAMILIES", "Base", "Conditioning", "Family", "Parts", "identify", "load_parts", "resolve_base"]
