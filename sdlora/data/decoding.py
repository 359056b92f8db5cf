"""What is done with a picture before it becomes a tensor: found readable, cut to size. Imports no torch.

So a process that does nothing else starts in a sixth of a second; `workers.py` leads such processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdlora.data.image import decode, read_bytes, resize_crop
from sdlora.errors import DatasetError


@dataclass(frozen=True)
class Seen:
    """What is known of a picture that was decoded.

    Attributes:
        digest: SHA-256 of the file's bytes, in hex.
        width: in pixels, upright.
        height: in pixels, upright.
        notes: what is left out or ignored of it.
    """

    digest: str
    width: int
    height: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Cut:
    """One way of cutting a picture to size, all (across, down) in pixels.

    Attributes:
        scaled: size of the whole picture after resizing.
        offset: where in it the part begins.
        size: of the part.
        flip: whether the part is mirrored afterwards.
    """

    scaled: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]
    flip: bool


def look(path: Path, background: str, before: Seen | None) -> Seen:
    """Decodes a picture to see whether that works, unless its bytes are those that were decoded before.

    Raises:
        DatasetError: with the reason.
    """
    content = read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    if before and before.digest == digest:
        return before
    decoded = decode(content, background)
    return Seen(digest, decoded.image.width, decoded.image.height, decoded.notes)


def cut(path: Path, digest: str, background: str, cuts: Sequence[Cut]) -> list[np.ndarray]:
    """Decodes a picture and cuts it to size: each part (H, W, 3), 8 bits.

    Raises:
        DatasetError: naming the file, if it is not the one of that hash, or cannot be decoded.
    """
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() != digest:  # or its latents would be kept under a wrong name
        raise DatasetError(f"{path} has changed while it was being read; run again")
    try:
        image = decode(content, background).image
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    parts = (np.asarray(resize_crop(image, c.scaled, c.offset, c.size)) for c in cuts)
    return [np.ascontiguousarray(part[:, ::-1] if c.flip else part) for part, c in zip(parts, cuts, strict=True)]


TASKS: dict[str, Callable[..., Any]] = {"look": look, "cut": cut}
