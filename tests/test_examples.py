"""The example pictures: thirty of one style, each with its words, none of the subjects that prompts are tested with."""

import importlib.util
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "datasets_example"
PICTURES = sorted(EXAMPLES.glob("*.png"))
HELD_OUT = {
    "castle", "dog", "tiger", "mushroom", "airplane", "cake", "crown", "robot", "lion", "umbrella", "ghost", "clock"
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("make_examples", ROOT / "tools" / "make_examples.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_thirty_pictures_each_with_a_caption_and_nothing_else():
    assert len(PICTURES) == 30
    expected = {p.name for p in PICTURES} | {p.with_suffix(".txt").name for p in PICTURES} | {"LICENSE"}
    assert {p.name for p in EXAMPLES.iterdir()} == expected


def test_pictures_are_readable_and_stand_on_white():
    for file in PICTURES:
        with Image.open(file) as picture:
            picture.load()
            assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (256, 256)), file.name
            assert picture.getpixel((0, 0)) == (255, 255, 255), file.name
            assert len(picture.getcolors(2**16) or range(2**16)) > 1000, f"{file.name} has hardly any shading"


def test_captions_are_plain_words_and_name_the_file():
    for file in PICTURES:
        caption = file.with_suffix(".txt").read_text(encoding="utf-8")
        assert re.fullmatch(r"[a-z]+( [a-z]+)*\n", caption), file.name
        assert caption.strip().replace(" ", "-") == file.stem


def test_held_out_subjects_are_absent(recipe):
    words = {word for file in PICTURES for word in file.stem.split("-")}
    assert not words & HELD_OUT
    assert recipe.HELD_OUT == HELD_OUT


def test_the_folder_stays_small_and_carries_its_licence():
    assert sum(p.stat().st_size for p in EXAMPLES.iterdir()) < 1.5e6
    text = (EXAMPLES / "LICENSE").read_text(encoding="utf-8")
    for part in (
        "MIT License",
        "Copyright (c) Microsoft Corporation",
        "fluentui-emoji",
        'THE SOFTWARE IS PROVIDED "AS IS"',
    ):
        assert part in text


def test_the_recipe_names_exactly_these_captions(recipe):
    assert {c.replace(" ", "-") for c in recipe.CONCEPTS} == {p.stem for p in PICTURES}


def test_the_recipe_puts_transparent_pictures_on_white(recipe, tmp_path):
    picture = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (16, 16, 48, 48))
    picture.save(tmp_path / "a.webp", lossless=True)
    result = recipe.on_white(tmp_path / "a.webp")
    assert result.size == (256, 256)
    assert result.getpixel((0, 0)) == (255, 255, 255)
    assert result.getpixel((128, 128)) == (0, 0, 255)


def test_the_recipe_finds_pictures_by_codepoint(recipe):
    assert recipe.codepoints("1F3E0-FE0F") == recipe.codepoints("1f3e0") == "1f3e0"
    assert recipe.codepoints("23-FE0F-20E3") == "0023-20e3"


def test_the_recipe_does_not_write_among_other_pictures(recipe, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"holiday\.jpg"):
        recipe.write_examples({}, tmp_path)


def test_the_recipe_says_which_concepts_a_wrong_package_lacks(recipe, tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "data.json").write_text("[]")
    with pytest.raises(SystemExit, match="not in these packages: cat face, bear"):
        recipe.find_pictures(tmp_path, tmp_path)


def test_licences_of_the_embedded_base_name_every_source():
    text = (ROOT / "sdlora" / "nano" / "LICENSES.md").read_text(encoding="utf-8")
    for part in (
        "TAESD",
        "Ollin Boer Bohan",
        "Noto",
        "Twemoji",
        "Microsoft",
        "EmojiOne",
        "Apache-2.0",
        "CC-BY 4.0",
        "MIT",
    ):
        assert part in text
    assert "MIT License" in (ROOT / "sdlora" / "nano" / "vae" / "LICENSE").read_text(encoding="utf-8")


def test_links_in_the_embedded_bases_readme_lead_somewhere():
    folder = ROOT / "sdlora" / "nano"
    text = (folder / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and all((folder / link).is_file() for link in links)
