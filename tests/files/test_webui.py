"""The rules by which WebUIs class a LoRA, row by row."""

import pytest

from sdlora.families import FAMILIES
from sdlora.files.webui import a1111_version, alias, forge_version, listing_notes, printable

XL, V1 = "stable-diffusion-xl-v1-base/lora", "stable-diffusion-v1/lora"
FLUX = "https://github.com/black-forest-labs/flux"


@pytest.mark.parametrize(
    ("metadata", "a1111", "forge"),
    [
        ({}, "Unknown", "Unknown"),
        ({"format": "pt"}, "SD1", "Unknown"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL", "SDXL"),
        ({"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "True"}, "SDXL", "SDXL"),
        ({"ss_v2": "True"}, "SD2", "SD2"),
        ({"ss_v2": "False"}, "SD1", "Unknown"),
        ({"modelspec.architecture": V1}, "SD1", "SD1"),
        ({"modelspec.architecture": V1, "ss_v2": "True"}, "SD2", "SD2"),
        ({"modelspec.architecture": XL}, "SD1", "SDXL"),
        ({"modelspec.architecture": XL, "ss_v2": "True"}, "SD2", "SDXL"),
        ({"modelspec.architecture": "flux-1-dev/lora"}, "SD1", "Flux"),
        ({"modelspec.implementation": FLUX, "modelspec.architecture": XL}, "SD1", "Flux"),
    ],
)
def test_classes(metadata, a1111, forge):
    assert (a1111_version(metadata), forge_version(metadata)) == (a1111, forge)


def test_our_files_are_shown_beside_their_base():
    assert a1111_version(FAMILIES["sd1"].metadata) == forge_version(FAMILIES["sd1"].metadata) == "SD1"


@pytest.mark.parametrize(
    ("metadata", "name"),
    [({}, "file"), ({"ss_output_name": "run7"}, "run7"), ({"ss_output_name": "None"}, "file")],
)
def test_the_name_in_a_prompt(metadata, name):
    assert alias(metadata, "file") == name


def test_what_is_not_shown_is_said():
    assert listing_notes("SD1", "SD1") == listing_notes("SD1", None) == []
    assert "lists it as Unknown" in listing_notes("Unknown", "SDXL")[0]
    assert "takes it for SD1, and hides it while an SDXL model is loaded" in listing_notes("SD1", "SDXL")[0]


def test_strangers_texts_are_made_harmless():
    assert printable("a\x1b[2Jb\r\nc\u202e\x00") == "a [2Jb  c  "
    assert printable("x" * 500, 10) == "xxxxxxx..."
    assert printable("aquarelle, ü 水彩") == "aquarelle, ü 水彩"
