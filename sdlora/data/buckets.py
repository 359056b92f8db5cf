"""Which size a picture trains at: about the same area for all, its own aspect ratio, nothing invented by enlarging.

Pure arithmetic on numbers, so it is tested in milliseconds and knows neither pictures nor tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

MAX_ASPECT = 4.0
"""The longest shape of a bucket, 4:1; of anything longer, like a banner, only a part of this shape is used."""
MAX_AREA_EXCESS = 1.1
"""A bucket's area never exceeds that of the square by more than this factor, so that memory can be foreseen."""


@dataclass(frozen=True)
class Fit:
    """How a picture is brought to its bucket: resized to cover it, then cut. All in pixels.

    Attributes:
        width: of the bucket.
        height: of the bucket.
        scaled_width: of the picture after resizing, at least `width`.
        scaled_height: of the picture after resizing, at least `height`.
    """

    width: int
    height: int
    scaled_width: int
    scaled_height: int


def step_for(resolution: int) -> int:
    """Returns the step between the sides of buckets, in pixels: an eighth of the resolution, a multiple of 8, 8 to 64.

    Source: 64 at 512 is the step of SD 1.x trainers; the eighth keeps the number of shapes the same for smaller bases.
    """
    return min(64, max(8, round(resolution / 64) * 8))


def fit(width: int, height: int, *, resolution: int, step: int, max_upscale: float, square: bool = False) -> Fit | None:
    """Chooses the bucket of a picture.

    The ideal bucket has the area of the square and the picture's aspect ratio. A picture too small for it gets a
    smaller one. Of the roundings to the step, the one with the least change of the aspect ratio is taken.

    Args:
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        resolution: side of the square picture whose area the bucket should have, in pixels.
        step: both sides of a bucket are multiples of it, in pixels.
        max_upscale: largest enlargement, at least 1.
        square: whether the bucket is a square whatever the picture's shape.

    Returns:
        The bucket, or `None` if the picture is too small even for sides of two steps.
    """
    if min(width, height) < 1:
        return None
    aspect = 1.0 if square else min(MAX_ASPECT, max(1 / MAX_ASPECT, width / height))
    ideal_width, ideal_height = resolution * math.sqrt(aspect), resolution / math.sqrt(aspect)
    shrink = min(1.0, max_upscale / max(ideal_width / width, ideal_height / height))
    ideal_width, ideal_height = ideal_width * shrink, ideal_height * shrink
    # Where enlarging is limited, rounding up is not to be had, so one more size below is tried.
    lowest = -1 if shrink < 1 else 0
    most = resolution * resolution * MAX_AREA_EXCESS
    sizes = [
        (w, h)
        for w, h in product(_roundings(ideal_width, step, lowest), _roundings(ideal_height, step, lowest))
        if w * h <= most and (w == h or not square) and _scale(width, height, w, h) <= max_upscale * (1 + 1e-9)
    ]
    if not sizes:
        return None
    ideal_area = ideal_width * ideal_height
    w, h = min(sizes, key=lambda s: (abs(math.log(s[0] / s[1] / aspect)), abs(math.log(s[0] * s[1] / ideal_area)), s))
    scale = _scale(width, height, w, h)
    return Fit(w, h, max(w, round(width * scale)), max(h, round(height * scale)))


def _roundings(side: float, step: int, lowest: int) -> tuple[int, ...]:
    below = math.floor(side / step + 1e-9)  # an ideal side of 511.9999 is 512
    return tuple(sorted({step * max(2, below + more) for more in range(lowest, 2)}))


def _scale(width: int, height: int, bucket_width: int, bucket_height: int) -> float:
    return max(bucket_width / width, bucket_height / height)


def crop_offset(
    fit: Fit, mode: Literal["center", "random"], fractions: tuple[float, float] = (0.0, 0.0)
) -> tuple[int, int]:
    """Returns where the bucket lies in the resized picture: (left, top), in pixels.

    Args:
        fit: the sizes.
        mode: `center`, or `random` for the place that the fractions say.
        fractions: two numbers in [0, 1), across and down; every place is equally likely if they are uniform.
    """
    across, down = fit.scaled_width - fit.width, fit.scaled_height - fit.height
    if mode == "center":
        return across // 2, down // 2
    return int(fractions[0] * (across + 1)), int(fractions[1] * (down + 1))
