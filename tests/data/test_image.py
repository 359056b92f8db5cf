"""Pictures of every kind come out as Pillow's own tools say they should look, and damaged ones with their reason."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from sdlora.data.colour import BAD_PROFILE, background_colour
from sdlora.data.image import FIRST_FRAME, decode, open_rgb, pixels, probe, resize_crop, sniff
from sdlora.errors import ConfigError, DatasetError

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8))
SMOOTH = Image.fromarray(np.linspace(0, 255, 12 * 20 * 3).reshape(12, 20, 3).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_agrees_with_pillow(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.bin"
    path.write_bytes(encoded(COLOURS, kind, exif=exif))
    with Image.open(path) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    got = open_rgb(path)
    assert np.array_equal(array(got), array(expected))
    assert (probe(path).width, probe(path).height) == got.size
    assert got.size == (COLOURS.size if orientation < 5 else COLOURS.size[::-1])


def test_exif_behind_the_pixels_of_a_png_counts_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    plain = encoded(COLOURS)
    assert decode(plain[:-12] + chunk + plain[-12:]).image.size == COLOURS.size[::-1]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_the_background(kind):
    alpha = Image.fromarray(RNG.integers(0, 256, (12, 20), dtype=np.uint8))
    picture = COLOURS.copy()
    picture.putalpha(alpha)
    content = encoded(picture, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    behind = Image.new("RGBA", COLOURS.size, "#336699")
    expected = array(Image.alpha_composite(behind, picture).convert("RGB"))
    assert abs(array(decode(content, "#336699").image) - expected).max() <= 1


def test_other_kinds_of_transparency():
    def corner(image: Image.Image, kind: str = "PNG", **options) -> tuple[int, ...]:
        return decode(encoded(image, kind, **options), "red").image.getpixel((0, 0))

    clear = Image.new("L", (4, 4), 0)
    grey = Image.merge("LA", (Image.new("L", (4, 4), 200), clear))
    palette = Image.new("P", (4, 4), 3)
    palette.putpalette([10, 20, 30] * 8)
    red = (255, 0, 0)
    assert corner(grey) == corner(grey, "TIFF") == red
    assert corner(palette, transparency=3) == red
    assert corner(palette, transparency=bytes([255, 255, 255, 0])) == red
    assert corner(palette, transparency=2) == (10, 20, 30)
    assert corner(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)) == red
    assert corner(Image.new("L", (4, 4), 7), transparency=7) == red
    assert corner(Image.new("1", (4, 4), 1), transparency=1) == red
    deep = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    assert corner(deep, transparency=40_000) == red
    assert corner(deep, transparency=40_001) == (156, 156, 156)  # 40000 / 257, rounded


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16)
    expected = np.round(ramp / 257)
    for values, kind in [
        (ramp.astype(np.uint16), "PNG"),
        (ramp.astype(np.uint16), "TIFF"),
        (ramp.astype(np.int32), "TIFF"),
        (ramp.astype(np.float32), "TIFF"),
        ((ramp / 65535).astype(np.float32), "TIFF"),
        ((ramp / 257).astype(np.float32), "TIFF"),
    ]:
        got = array(decode(encoded(Image.fromarray(values), kind)).image)
        assert abs(got - expected[..., None]).max() <= 1
    with pytest.raises(DatasetError, match="not finite"):
        decode(encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))
    with pytest.raises(DatasetError, match="1e\\+09"):
        decode(encoded(Image.fromarray(np.full((4, 4), 1e9, np.float32)), "TIFF"))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("1", "PNG"), ("1", "BMP"), ("L", "JPEG"), ("L", "TIFF"), ("P", "PNG"), ("P", "BMP"), ("CMYK", "JPEG")),
        *(("CMYK", "TIFF"), ("YCbCr", "TIFF"), ("RGB", "BMP"), ("RGB", "WEBP")),
    ],
)
def test_plain_modes_agree_with_pillow(mode, kind):
    content = encoded(SMOOTH.convert(mode), kind)
    with Image.open(io.BytesIO(content)) as image:
        expected = array(image.convert("RGB"))
    assert np.array_equal(array(decode(content).image), expected)


def wide_profile() -> bytes:
    """An RGB profile that is not sRGB: its red and green colorant tags change places."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = content.index(b"rXYZ"), content.index(b"gXYZ")
    content[red : red + 4], content[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(content)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colour_profiles_are_converted_as_littlecms_says(kind):
    icc = wide_profile()
    content = encoded(COLOURS, kind, icc_profile=icc, **({"lossless": True} if kind == "WEBP" else {}))
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    expected = ImageCms.profileToProfile(COLOURS, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    got = decode(content)
    assert expected is not None and np.array_equal(array(got.image), array(expected))
    assert abs(array(got.image) - array(COLOURS)).max() > 30
    assert got.notes == ()


def test_a_profile_does_not_touch_the_background():
    picture = COLOURS.copy()
    picture.putalpha(0)
    got = array(decode(encoded(picture, icc_profile=wide_profile()), "#c81e64").image)
    assert (got == [200, 30, 100]).all()


def test_a_grey_picture_may_carry_an_rgb_profile():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = SMOOTH.convert("L")
    got = decode(encoded(grey, icc_profile=srgb))
    assert got.notes == () and abs(array(got.image) - array(grey.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_an_unusable_profile_is_noted_and_ignored(mode):
    picture = SMOOTH.convert(mode)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    got = decode(encoded(picture, "TIFF", icc_profile=b"nonsense" * 40 if mode == "RGB" else srgb))
    assert got.notes == (BAD_PROFILE,)
    assert np.array_equal(array(got.image), array(picture.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_said(kind, tmp_path):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / "moving"
    path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert probe(path).notes == (FIRST_FRAME,)
    got = decode(path.read_bytes())
    assert got.notes == (FIRST_FRAME,) and got.image.getpixel((0, 0)) == (255, 0, 0)


def test_the_content_says_what_a_file_is(tmp_path):
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        assert sniff(encoded(COLOURS, kind)[:32]) == kind
    path = tmp_path / "really a jpeg.png"
    path.write_bytes(encoded(COLOURS, "JPEG"))
    assert open_rgb(path).size == COLOURS.size


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a picture"),
        (encoded(COLOURS, "GIF"), "a GIF; PNG, JPEG, WEBP, BMP, TIFF can be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (encoded(COLOURS, "JPEG")[:400], "damaged JPEG"),
        (encoded(COLOURS)[:-30], "damaged PNG"),
        (encoded(COLOURS)[:10], "damaged PNG: the header makes no sense"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_reason(content, reason, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=f"picture.png: .*{reason}"):
        open_rgb(path)
    with pytest.raises(DatasetError, match=r"gone\.png: No such file"):
        open_rgb(tmp_path / "gone.png")


@pytest.mark.parametrize("side", [9_700, 10_001, 40_000])
def test_a_bomb_is_refused_from_its_header(side, tmp_path):
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b""))
    if side * side <= 100_000_000:  # Pillow alone would warn here
        assert probe(path).width == side
    else:
        for read in (probe, open_rgb):
            with pytest.raises(DatasetError, match=r"bomb\.png: .* more than the 100 million"):
                read(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_damage_anywhere_never_gives_another_error(kind):
    whole = encoded(SMOOTH, kind, exif=COLOURS.getexif()) if kind != "BMP" else encoded(SMOOTH, kind)
    rng = random.Random(0)
    for _ in range(150):
        broken = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(4)):
            if broken:
                broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            assert decode(bytes(broken)).image.mode == "RGB"
        except DatasetError as error:
            assert "\n" not in str(error)


def test_pixels_run_from_minus_one_to_one():
    got = pixels(COLOURS)
    assert got.shape == (3, 12, 20) and got.dtype == torch.float32
    assert torch.equal(((got + 1) * 127.5).round().permute(1, 2, 0).int(), torch.from_numpy(np.array(COLOURS)).int())
    assert pixels(Image.new("RGB", (1, 1), "black")).unique().tolist() == [-1]
    assert pixels(Image.new("RGB", (1, 1), "white")).unique().tolist() == [1]


def test_cutting_while_resizing_equals_cutting_afterwards():
    picture = Image.fromarray(RNG.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    for scaled, offset, size in [((65, 45), (10, 3), (40, 40)), ((260, 180), (50, 0), (160, 176))]:
        whole = picture.resize(scaled, Image.Resampling.LANCZOS)
        expected = whole.crop((*offset, offset[0] + size[0], offset[1] + size[1]))
        assert abs(array(resize_crop(picture, scaled, offset, size)) - array(expected)).max() <= 1
    assert np.array_equal(array(resize_crop(picture, (130, 90), (0, 0), (130, 90))), array(picture))


@pytest.mark.parametrize("colour", ["whit", "#ff", "#ff000080", ""])
def test_a_background_must_be_an_opaque_colour(colour):
    with pytest.raises(ConfigError, match=r"data\.background must be a colour name"):
        background_colour(colour)
