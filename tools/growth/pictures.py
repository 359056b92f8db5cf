"""A folder of small captioned pictures of several shapes, the same bytes for the same number every time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((32, 32), (40, 24), (24, 40), (48, 24), (24, 48))
"""Width and height in pixels, of about the same area. They are small, so that ten thousand are encoded soon."""
_COARSE = 6
"""Blots to a side: enough for every picture to be another one."""
_COLOURS = ("red", "blue", "green", "golden", "silver", "white", "black")
_THINGS = ("teapot", "bicycle", "rocket", "owl", "castle", "guitar", "turtle", "camera", "sailboat")


def write_pictures(folder: Path, count: int) -> None:
    """Writes pictures and captions; of every shape there are equally many, and no two are alike.

    Args:
        folder: is made.
        count: of pictures, a multiple of the number of `SHAPES`.
    """
    if count % len(SHAPES):
        raise ValueError(f"{count} pictures are not equally many of {len(SHAPES)} shapes")
    folder.mkdir(parents=True)
    for number in range(count):
        blots = np.random.default_rng(number).integers(0, 256, (_COARSE, _COARSE, 3), dtype=np.uint8)
        picture = Image.fromarray(blots).resize(SHAPES[number % len(SHAPES)], Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:06d}.png", compress_level=1)
        (folder / f"{number:06d}.txt").write_text(caption(number), encoding="utf-8")


def caption(number: int) -> str:
    """Returns the caption of a picture, which no other one has."""
    return f"a {_COLOURS[number % len(_COLOURS)]} {_THINGS[number % len(_THINGS)]}, seen {number} times"
