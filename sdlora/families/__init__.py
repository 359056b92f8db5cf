"""Base models: what they are, how to find and load them. Never an `if family`: a family is data and functions."""

from sdlora.families.family import Conditioning, Family, Parts, PictureSize
from sdlora.families.loading import (
    Base,
    identify,
    load_parts,
    native_cfg,
    native_resolution,
    native_width,
    resolve_base,
)
from sdlora.families.table import FAMILIES

__all__ = [
    "FAMILIES",
    "Base",
    "Conditioning",
    "Family",
    "Parts",
    "PictureSize",
    "identify",
    "load_parts",
    "native_cfg",
    "native_resolution",
    "native_width",
    "resolve_base",
]
