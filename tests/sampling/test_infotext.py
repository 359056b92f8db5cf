"""The text in a PNG is the WebUI's: its reader finds every setting again."""

from dataclasses import replace

import pytest
from PIL import Image

from sdlora.sampling.infotext import (
    decoder_of,
    parameters,
    parse_parameters,
    png_info,
    same_but_for_loras,
    stored_text,
)
from sdlora.sampling.prompts import Prompt

PROMPT = Prompt("a castle, on a hill", "blurry", 512, 768, 7, 7.0, 20, "DPM++ 2M Karras")
NOTHING = {"base_name": "sd15", "base_hash": None, "loras": [], "clip_skip": 1, "version": "0.1.0"}


def test_the_whole_text():
    text = parameters(
        PROMPT,
        base_name="sd15",
        base_hash="6ce0161689",
        loras=[("style", 0.8, "0123456789abcdef0123"), ("other", 1.0, "ffffffffffffffff")],
        clip_skip=2,
        version="0.1.0",
    )
    assert text == (
        "a castle, on a hill <lora:style:0.8> <lora:other:1>\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 512x768, "
        "Model hash: 6ce0161689, Model: sd15, Clip skip: 2, RNG: CPU, "
        'Lora hashes: "style: 0123456789ab, other: ffffffffffff", Version: sdlora 0.1.0'
    )


def test_what_is_default_is_left_out():
    text = parameters(replace(PROMPT, negative=""), **NOTHING)
    assert all(word not in text for word in ("Negative prompt", "Clip skip", "Lora hashes", "Model hash", "<lora"))


def test_a_lora_without_a_hash_still_gets_its_tag():
    text = parameters(PROMPT, **{**NOTHING, "loras": [("style", 1.0, "")]})
    assert "<lora:style:1>" in text and "Lora hashes" not in text


@pytest.mark.parametrize("name", ["plain", "a, b: c", 'with "quotes"', "back\\slash, too", "zwei\nZeilen", "名前, x"])
@pytest.mark.parametrize("negative", ["", "blurry, ugly: very", "line one\nline two"])
def test_round_trip(name, negative):
    prompt = replace(PROMPT, text="a castle, Steps: many\nsecond line", negative=negative)
    text = parameters(prompt, **{**NOTHING, "base_name": name})
    positive, found_negative, fields = parse_parameters(text)
    assert (positive, found_negative) == (prompt.text, negative)
    assert fields["Model"] == name
    assert fields["Size"] == "512x768" and fields["Seed"] == "7" and fields["Version"] == "sdlora 0.1.0"


def test_a_text_without_settings_is_all_prompt():
    assert parse_parameters("just words, really: yes") == ("just words, really: yes", "", {})


@pytest.mark.parametrize("text", ["plain", "名前 café", "two\nlines"])
def test_png_carries_it(tmp_path, text):
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, pnginfo=png_info(text))
    with Image.open(path) as image:
        assert image.info["parameters"] == text


def test_what_decoded_a_picture_is_named_as_the_webui_does(tmp_path):
    plain, quick = (parameters(PROMPT, **NOTHING, decoder=decoder) for decoder in (None, "TAESD"))
    assert parse_parameters(quick)[2]["VAE Decoder"] == "TAESD"
    assert (decoder_of(plain), decoder_of(quick)) == (None, "TAESD")
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(file, pnginfo=png_info(quick))
    assert stored_text(file) == quick


def test_the_same_picture_is_known_whatever_drew_it():
    plain = parameters(PROMPT, **NOTHING)
    drawn = parameters(PROMPT, **{**NOTHING, "loras": [("style", 1.0, "ab" * 32)]}, decoder="TAESD")
    assert same_but_for_loras(plain, drawn)
    assert not same_but_for_loras(plain, parameters(replace(PROMPT, seed=8), **NOTHING))
