"""All families, in one place."""

from __future__ import annotations

from sdlora.families.family import Family
from sdlora.families.sd1 import SD1
from sdlora.families.sd2 import SD2
from sdlora.families.sdxl import SDXL

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL)}
