"""One way from the bytes of a picture to upright RGB pixels; what a file is, its content says, not its ending.

The order is: size check from the header, decoding, 16 to 8 bit, colour profile to sRGB, transparency onto a background,
the camera's rotation. What is left out or ignored becomes a note.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from sdlora.data.colour import background_colour, eight_bit, flat_rgb
from sdlora.errors import DatasetError

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
"""What is decoded; Pillow's other plugins stay shut, for some of them start programs."""
MAX_PIXELS = 100_000_000
"""Larger pictures are refused before they are decoded: a file of some kilobytes can claim to hold gigabytes."""
MAX_BYTES = 2**30
"""Larger files are not read."""

FIRST_FRAME = "animated, first frame only"
BAD_EXIF = "EXIF data unreadable, rotation unknown"

_SIGNATURES = {
    # (offset, bytes) -> format; the first five are those of FORMATS
    (0, b"\x89PNG\r\n\x1a\n"): "PNG",
    (0, b"\xff\xd8\xff"): "JPEG",
    (8, b"WEBP"): "WEBP",
    (0, b"BM"): "BMP",
    (0, b"II*\0"): "TIFF",
    (0, b"MM\0*"): "TIFF",
    (0, b"GIF8"): "GIF",
    (4, b"ftypavi"): "AVIF",
    (4, b"ftyphei"): "HEIC",
    (4, b"ftypmif1"): "HEIC",
    (0, b"\xff\x0a"): "JPEG XL",
    (4, b"JXL "): "JPEG XL",
    (0, b"8BPS"): "Photoshop file",
    (0, b"<svg"): "SVG",
    (0, b"version https://git-lfs"): "Git LFS pointer, not the picture itself",
}
_TURNS = {
    # EXIF orientation -> how the stored picture is turned upright; 1 and unknown values: not at all
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class Probe:
    """What the header of a picture says.

    Attributes:
        width: in pixels, upright.
        height: in pixels, upright.
        notes: what will be left out or ignored.
    """

    width: int
    height: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Decoded:
    """A picture ready to be resized.

    Attributes:
        image: upright, RGB, in sRGB colours.
        notes: what was left out or ignored.
    """

    image: Image.Image
    notes: tuple[str, ...]


def sniff(head: bytes) -> str | None:
    """Tells the format from the first bytes of a file (32 are enough), or `None` if it is no picture known here."""
    for (offset, signature), name in _SIGNATURES.items():
        if head[offset : offset + len(signature)] == signature:
            return None if name == "BMP" and head[15:18] != bytes(3) else name  # words begin with BM, too
    return None


def probe(path: Path) -> Probe:
    """Reads the size and oddities of a picture from its header; pixels are not decoded.

    Raises:
        DatasetError: naming the file, if it is no picture that can be used.
    """
    content = read_bytes(path)
    with _naming(path), _opened(content) as image:
        late = image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys()
        orientation, notes = (1, []) if late else _orientation(image)  # looking for more would decode the pixels
        if image.format == "TIFF":
            orientation = 1  # Pillow's plugin turns it, and tells the size it will then have
        width, height = image.size if orientation < 5 else image.size[::-1]
        return Probe(width, height, (*_frame_notes(image), *notes))


def open_rgb(path: Path, background: str = "white") -> Image.Image:
    """Reads a picture, whatever its kind, as upright RGB in sRGB colours.

    Args:
        path: the file; its ending does not matter.
        background: colour that shows through where it is transparent.

    Raises:
        DatasetError: naming the file and the reason.
    """
    content = read_bytes(path)
    with _naming(path):
        return decode(content, background).image


def read_bytes(path: Path) -> bytes:
    """Reads a file.

    Raises:
        DatasetError: if that is impossible or it is larger than `MAX_BYTES`.
    """
    try:
        size = path.stat().st_size
        if size <= MAX_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}") from error
    raise DatasetError(f"{path}: {size / 2**20:.0f} MiB, more than the {MAX_BYTES / 2**20:.0f} MiB that are read")


def decode(content: bytes, background: str = "white") -> Decoded:
    """Decodes a picture in memory; see `open_rgb`.

    Raises:
        DatasetError: with the reason alone, for there is no file to name.
    """
    colour = background_colour(background)
    with _opened(content) as image:
        notes = _frame_notes(image)
        rescale = _sixteen_bit_rgb(image)
        image.load()
        orientation, exif_notes = _orientation(image)
        if rescale and isinstance(key := image.info.get("transparency"), tuple):
            image.info["transparency"] = tuple(value >> 8 for value in key)  # Pillow has kept the upper bytes only
        picture, profile_notes = flat_rgb(eight_bit(image), image.info.get("icc_profile"), colour)
    if orientation in _TURNS:
        picture = picture.transpose(_TURNS[orientation])
    return Decoded(picture, (*notes, *exif_notes, *profile_notes))


def pixels(image: Image.Image | np.ndarray) -> Tensor:
    """Turns a picture, or its bytes (H, W, 3), into a tensor, (3, H, W), fp32, from -1 (black) to 1 (full light)."""
    import torch  # not above: a process that only decodes does without, and is there ten times sooner

    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def resize_crop(
    image: Image.Image, scaled: tuple[int, int], offset: tuple[int, int], size: tuple[int, int]
) -> Image.Image:
    """Resizes a picture to `scaled` and cuts out `size` at `offset`; all (across, down), in pixels.

    Only the part that is cut out is computed, so a banner of extreme length costs no more than any other picture.
    """
    zoom = image.width / scaled[0], image.height / scaled[1]
    left, top = offset[0] * zoom[0], offset[1] * zoom[1]
    right = min(image.width, (offset[0] + size[0]) * zoom[0])
    bottom = min(image.height, (offset[1] + size[1]) * zoom[1])
    return image.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom), reducing_gap=3.0)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Opens a picture and turns everything that Pillow may raise for a damaged one into one kind of error."""
    kind = sniff(content[:32])
    if not content:
        raise DatasetError("the file is empty")
    if kind not in FORMATS:
        raise DatasetError(f"{_found(kind)}; {', '.join(FORMATS)} can be read")
    try:
        with _quiet():
            image = Image.open(io.BytesIO(content), formats=list(FORMATS))
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise _too_large(f"{image.width} x {image.height} pixels")
            yield image
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large("far too many pixels") from error
    except Exception as error:  # Pillow has a dozen kinds for damaged files, by plugin
        reason = " ".join(str(error).split()) or type(error).__name__
        if "cannot identify" in reason:
            reason = "the header makes no sense"
        raise DatasetError(f"damaged {kind}: {reason}") from error


def _found(kind: str | None) -> str:
    return "not a picture" if kind is None else f"{'an' if kind in ('AVIF', 'SVG') else 'a'} {kind}"


def _too_large(seen: str) -> DatasetError:
    return DatasetError(f"{seen}, more than the {MAX_PIXELS // 10**6} million that are read; make it smaller")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Pillow's warnings off the terminal: sizes are checked here, and what is ignored becomes a note."""
    with _WARNINGS, warnings.catch_warnings():  # the filters are shared by all threads
        warnings.simplefilter("ignore")
        yield


def _frame_notes(image: Image.Image) -> list[str]:
    # Phones append a depth map or the like to a JPEG, which Pillow calls MPO; nothing of the picture is left out.
    return [FIRST_FRAME] if getattr(image, "is_animated", False) and image.format != "MPO" else []


def _orientation(image: Image.Image) -> tuple[int, list[str]]:
    try:
        with _quiet():
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as above
        return 1, [BAD_EXIF]
    return (value, []) if isinstance(value, int) else (1, [BAD_EXIF])


def _sixteen_bit_rgb(image: Image.Image) -> bool:
    return any("RGB;16" in str(tile[3]) for tile in getattr(image, "tile", ()))
