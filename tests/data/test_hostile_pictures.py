"""Some seventy odd, damaged and hostile pictures: what becomes of each is pinned, and none stops a run."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdlora.config_io import load_config
from sdlora.data.folder import scan
from sdlora.training.train import train

SIZE = (72, 64)


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).reshape(size[1], size[0], 3).astype(np.uint8)
    return Image.fromarray(ramp).convert(mode)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes that claims to be as large as one likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(picture(), "JPEG", exif=exif)


def sixteen_bits() -> bytes:
    ramp = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[1], SIZE[0]).astype(np.uint16)
    return saved(Image.fromarray(ramp), "PNG")


def cmyk_with_adobe_marker() -> bytes:
    return saved(picture("CMYK"), "JPEG")  # Pillow writes the marker, and inverts as Adobe does


def profile(content: bytes | None = None) -> bytes:
    content = content or ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return saved(picture(), "PNG", icc_profile=content)


PNG, JPEG, WEBP, TIFF = (saved(picture(), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF"))
FRAMES = {"save_all": True, "append_images": [picture("RGB").rotate(90)]}
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'

GOOD: dict[str, bytes] = {
    "plain.png": PNG,
    "plain.jpg": JPEG,
    "plain.webp": WEBP,
    "plain.bmp": saved(picture(), "BMP"),
    "plain.tiff": TIFF,
    "png named.jpg": PNG,
    "jpeg named.webp": JPEG,
    "webp named.png": WEBP,
    "cmyk.jpg": cmyk_with_adobe_marker(),
    "cmyk.tif": saved(picture("CMYK"), "TIFF"),
    "grey.png": saved(picture("L"), "PNG"),
    "one bit.png": saved(picture("1"), "PNG"),
    "palette.png": saved(picture("P"), "PNG"),
    "palette see-through.png": saved(picture("P"), "PNG", transparency=3),
    "rgba.png": saved(picture("RGBA"), "PNG"),
    "rgba.webp": saved(picture("RGBA"), "WEBP"),
    "la.png": saved(picture("LA"), "PNG"),
    "sixteen bits.png": sixteen_bits(),
    "lab.tif": saved(picture("LAB"), "TIFF"),
    "progressive.jpg": saved(picture(), "JPEG", progressive=True),
    "interlaced size 1.png": saved(picture(size=(1, 1)), "PNG"),
    "banner.png": saved(picture(size=(1, 10_000)), "PNG"),
    "tower.png": saved(picture(size=(10_000, 1)), "PNG"),
    "several pages.tif": saved(picture(), "TIFF", **FRAMES),
    "animated.png": saved(picture(), "PNG", **FRAMES),
    "animated.webp": saved(picture(), "WEBP", **FRAMES),
    "lzw.tif": saved(picture(), "TIFF", compression="tiff_lzw"),
    "profile.png": profile(),
    "broken profile.png": profile(b"no profile at all" * 20),
    "data behind the end.png": PNG + b"PK\x03\x04 and more",
    "exif behind the end.jpg": JPEG + b"\0" * 500,
    "broken exif.jpg": saved(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "ending in capitals.PNG": PNG,
    "naïve 名前 🙂.png": PNG,
    "with 'quotes\" and $(touch pwned) `x`.png": PNG,
    "-rf.png": PNG,
    "a" * 200 + ".png": PNG,
    **{f"turned {i}.jpg": turned(i) for i in range(1, 9)},
}
"""What is used."""

BAD: dict[str, tuple[bytes, str]] = {
    "bomb.png": (bomb(60_000, 60_000), "far too many pixels"),
    "smaller bomb.png": (bomb(12_000, 12_000), "12000 x 12000 pixels"),
    "wide bomb.png": (bomb(2**31 - 1, 1), "far too many pixels|damaged|pixels"),
    "empty.png": (b"", "the file is empty"),
    "moving.gif": (saved(picture("P"), "GIF", **FRAMES), "a GIF"),
    "drawing.svg": (SVG, "an SVG"),
    "svg named.png": (SVG, "an SVG"),
    "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not a picture"),
    "words.png": (b"a red teapot\n", "not a picture"),
    "zip named.png": (b"PK\x03\x04" + bytes(100), "not a picture"),
    "program.png": (b"\x7fELF" + bytes(100), "not a picture"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run", "not a picture"),
    "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(100), "a HEIC"),
    "photo.avif": (b"\0\0\0\x1cftypavif" + bytes(100), "an AVIF"),
    "layers.psd": (b"8BPS\0\x01" + bytes(100), "a Photoshop file"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "head only.png": (PNG[:8], "damaged PNG"),
    "head only.jpg": (JPEG[:3], "damaged JPEG"),
    "no end.bmp": (saved(picture(), "BMP")[:60], "damaged BMP"),
    "wrong checksum.png": (PNG[:29] + b"\0\0\0\0" + PNG[33:], "damaged PNG"),
    "riff without picture.webp": (b"RIFF\x04\0\0\0WEBP", "damaged WEBP"),
    "directory into nowhere.tif": (b"II*\0\xff\xff\xff\x7f", "damaged TIFF"),
    **{f"png cut at {i} tenths.png": (PNG[: len(PNG) * i // 10], "damaged PNG") for i in range(1, 10)},
    **{f"jpeg cut at {i} tenths.jpg": (JPEG[: len(JPEG) * i // 10], "damaged JPEG") for i in range(1, 10)},
}
"""What is left out, and the reason that is given."""

HIDDEN = {"._plain.png": b"\0\x05\x16\x07", ".DS_Store": b"\0\0\0\1Bud1", "Thumbs.db": b"\xd0\xcf\x11\xe0"}


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "pictures"
    place.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in [*GOOD.items(), *((n, c) for n, (c, _) in BAD.items()), *HIDDEN.items()]:
            (place / name).write_bytes(content)
    (place / "itself").symlink_to(place, target_is_directory=True)
    (place / "nowhere.png").symlink_to(place / "there is no such file.png")
    (place / "round.png").symlink_to(place / "round.png")
    os.mkfifo(place / "pipe.png")
    (place / "folder.png").mkdir()
    return place


def test_there_are_enough_of_them():
    assert len(GOOD) + len(BAD) + len(HIDDEN) + 5 >= 60


def test_each_picture_is_used_or_named_with_its_reason(folder):
    found = scan(folder)
    assert {example.path.name for example in found.examples} == set(GOOD)
    reasons = {Path(name).name: reason for name, reason in found.unreadable.items()}
    assert set(BAD) <= set(reasons)
    for name, (_, reason) in BAD.items():
        assert any(part in reasons[name] for part in reason.split("|")), f"{name}: {reasons[name]}"
    assert "broken link or no regular file (nowhere.png, pipe.png, round.png)" in found.summary()
    assert "link to a folder that is read anyway (itself)" in found.summary()
    assert found.hidden == len(HIDDEN)
    for line in (found.summary(), *found.unreadable.values()):
        assert "\n" not in line and "\x1b" not in line


def test_a_picture_that_must_not_be_read_is_named(folder):
    locked = folder / "plain.png"
    locked.chmod(0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may read everything")
        assert "plain.png" in scan(folder).unreadable
    finally:
        locked.chmod(0o644)


def test_a_run_learns_from_the_good_ones_and_changes_nothing(folder, tiny_base, tmp_path):
    before = {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()}
    config = load_config(
        None,
        {
            "base.model": str(tiny_base),
            "data.images": folder,
            "data.batch_size": 8,
            "lora.rank": 1,
            "train.steps": 2,
            "samples.sample_every": 0,
            "output.output": tmp_path / "run",
            "output.name": "x",
        },
    )
    result = train(config)
    assert result.finished and result.certificate.num_modules > 0
    assert {path.name: path.lstat().st_mtime_ns for path in folder.iterdir()} == before
    assert not Path("pwned").exists()
