"""Drawings are found by code point or by name, and rendered the same everywhere."""

import hashlib
import json

import pytest
from PIL import Image

from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.drawings import Names, drawings, on_white, render, slugify
from tools.pretrain_nano.sources import UNICODE_NAMES, WORDS, Style, unpacked

CASTLE = Concept("1f3f0", "castle", ("building",), "travel and places", "castle", "learn")
HAT = Concept("1f452", "woman's hat", (), "objects", "woman's hat", "learn")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 20"><path fill="red" d="M0 0h10v20H0z"/></svg>'


@pytest.fixture
def names(tmp_path) -> Names:
    words, unicode_names = tmp_path / "words", tmp_path / "unicode"
    (words / "en").mkdir(parents=True)
    unicode_names.mkdir()
    data = [{"hexcode": "1F3F0", "label": "castle"}, {"hexcode": "1F452", "label": "woman’s hat"}]
    (words / "en" / "data.json").write_text(json.dumps(data))
    (unicode_names / "data-by-emoji.json").write_text(json.dumps({"🏰": {"name": "castle"}}))
    return Names({WORDS: words, UNICODE_NAMES: unicode_names})


def icon_set(folder, icons, chars=None, aliases=None):
    folder.mkdir()
    square = {"body": '<path fill="currentColor" d="M0 0h8v8H0z"/>'}
    content = {"icons": dict.fromkeys(icons, square), "aliases": aliases or {}, "width": 16, "height": 16}
    (folder / "icons.json").write_text(json.dumps(content))
    (folder / "chars.json").write_text(json.dumps(chars or {}))
    return Style("a-set", "a set", "a-set@1", "MIT", "somebody", "base")


def found(style, folder, names):
    return {concept.code for concept, _ in drawings(style, folder, [CASTLE, HAT], names)}


def test_icons_are_found_by_label_unicode_name_and_run_together(tmp_path, names):
    assert found(icon_set(tmp_path / "a", ["castle", "womans-hat"]), tmp_path / "a", names) == {"1f3f0", "1f452"}
    assert found(icon_set(tmp_path / "b", ["european-castle", "womanshat"]), tmp_path / "b", names) == {
        "1f3f0",
        "1f452",
    }


def test_code_points_decide_where_a_set_has_them(tmp_path, names):
    style = icon_set(tmp_path / "c", ["castle", "fort"], chars={"1f3f0": "fort"})
    assert found(style, tmp_path / "c", names) == {"1f3f0"}


def test_an_alias_is_followed_unless_it_turns_the_drawing(tmp_path, names):
    style = icon_set(tmp_path / "d", ["fort"], aliases={"castle": {"parent": "fort"}})
    assert found(style, tmp_path / "d", names) == {"1f3f0"}
    style = icon_set(tmp_path / "e", ["fort"], aliases={"castle": {"parent": "fort", "hFlip": True}})
    assert found(style, tmp_path / "e", names) == set()


def test_no_two_concepts_share_a_drawing(tmp_path, names):
    aliases = {"castle": {"parent": "thing"}, "womans-hat": {"parent": "thing"}}
    style = icon_set(tmp_path / "f", ["thing"], aliases=aliases)
    assert found(style, tmp_path / "f", names) == {"1f3f0"}


def test_slugs_are_those_of_icon_sets():
    assert slugify("Woman’s hat") == "womans-hat"
    assert slugify("piñata") == "pinata"
    assert slugify("1st place medal") == "1st-place-medal"


def test_a_narrow_drawing_is_centred_on_white():
    picture = on_white(render(SVG))
    assert picture.size == (128, 128) and picture.mode == "RGB"
    assert picture.getpixel((64, 64)) == (255, 0, 0)
    assert picture.getpixel((10, 64)) == picture.getpixel((118, 64)) == (255, 255, 255)
    assert [picture.getpixel((x, 1)) for x in (33, 94)] == [(255, 0, 0)] * 2


def test_rendering_is_the_same_everywhere():
    round_thing = SVG.replace("M0 0h10v20H0z", "M5 0a5 10 0 1 0 0 20a5 10 0 1 0 0-20")
    pixels = on_white(render(round_thing)).tobytes()
    assert hashlib.sha256(pixels).hexdigest() == "0fcb18894e7eec83703f5a1d15b61f44bc9a323532a172e35c733e39bc61c999"


def test_half_transparent_pixels_are_mixed_with_white():
    picture = Image.new("RGBA", (256, 256), (255, 0, 0, 128))
    assert on_white(picture).getpixel((5, 5)) == (255, 127, 127)


def test_an_archive_with_another_hash_is_refused(tmp_path):
    (tmp_path / "iconify-json-noto-1.2.9.tgz").write_bytes(b"something else")
    with pytest.raises(SystemExit, match="expected"):
        unpacked("@iconify-json/noto@1.2.9", tmp_path)
