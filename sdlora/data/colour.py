"""Pixels of any kind, 16-bit, CMYK, palette, with a profile or transparency, become plain 8-bit sRGB.

Colours first, transparency second: the background is an sRGB colour and must not go through the picture's profile.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

from sdlora.errors import ConfigError, DatasetError

BAD_PROFILE = "colour profile unusable, ignored"


def background_colour(background: str) -> tuple[int, int, int]:
    """Reads a colour: a name as in CSS, or #rrggbb.

    Raises:
        ConfigError: if it is neither, or is itself transparent.
    """
    try:
        colour = ImageColor.getrgb(background)
    except ValueError:
        colour = ()
    if len(colour) != 3:
        raise ConfigError(f"data.background must be a colour name or #rrggbb, got {background!r}")
    return colour


def eight_bit(image: Image.Image) -> Image.Image:
    """Scales grey pictures of 16 or 32 bits to 8, instead of clipping them; others pass.

    The scale of floating point numbers is not written in the file, so it is taken from their largest value.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DatasetError("it holds numbers that are not finite")
    limits = [65535, 2**32 - 1] if image.mode != "F" else [1, 255, 65535, np.inf]
    limit = next(limit for limit in limits if values.max() <= limit)
    if not np.isfinite(limit):
        raise DatasetError(f"its values reach {values.max():.4g}; expected at most 1, 255 or 65535")
    grey = Image.fromarray(np.clip(values * (255 / limit) + 0.5, 0, 255).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return grey


def flat_rgb(image: Image.Image, icc: bytes | None, background: tuple[int, int, int]) -> tuple[Image.Image, list[str]]:
    """Brings an 8-bit picture of any mode to sRGB, without transparency."""
    transparent = image.has_transparency_data
    grey = image.mode in ("1", "L", "LA", "La")
    notes: list[str] = []
    if image.mode not in ("CMYK", "LAB"):
        image = image.convert(("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB"))
    alpha = image.getchannel("A") if transparent else None
    colours = image.convert("L" if grey else "RGB") if transparent else image
    try:
        colours = _to_srgb(colours, icc)
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append(BAD_PROFILE)
        colours = _to_srgb(colours, None)
    if alpha is None:
        return colours, notes
    flat = Image.new("RGB", image.size, background)
    flat.paste(colours, mask=alpha)
    return flat, notes


def _to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Converts colours by an ICC profile, or by Pillow's plain formulas if there is none.

    Raises:
        PyCMSError, OSError, ValueError: if the profile is damaged or is one for other kinds of pictures.
    """
    if image.mode == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif icc:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    else:
        return image.convert("RGB")
    description: Any = profile.profile
    if description.xcolor_space.strip() == "RGB" and image.mode == "L":
        image = image.convert("RGB")  # usual for grey pictures saved by programs that know one profile only
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is, unless asked to work in place
    return converted
