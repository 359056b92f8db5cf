"""The files beside a LoRA are what WebUIs read, and come back as they were written."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora.errors import LoraFileError
from sdlora.families import FAMILIES
from sdlora.files.kohya import LoraFile
from sdlora.files.sidecars import activation_text, write_sidecars

SD1 = FAMILIES["sd1"]


def lora(path: Path, **metadata: str) -> LoraFile:
    return LoraFile(path, {}, {key.replace("__", "."): text for key, text in metadata.items()}, torch.float16)


def test_both_files_lie_beside_the_lora(tmp_path):
    path = tmp_path / "my.style.safetensors"
    picture = Image.new("RGBA", (1024, 768), (10, 20, 30, 255))
    files = write_sidecars(path, trigger="mystyle ü", description="12 pictures", preview=picture, family=SD1)
    assert files == [tmp_path / "my.style.json", tmp_path / "my.style.png"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert json.loads(files[0].read_text(encoding="utf-8")) == {
        "description": "12 pictures",
        "sd version": "SD1",
        "activation text": "mystyle ü",
        "preferred weight": 0,
        "negative text": "",
        "notes": "",
    }
    with Image.open(files[1]) as image:
        assert (image.size, image.mode, image.getpixel((5, 5))) == ((512, 384), "RGB", (10, 20, 30))
    assert picture.size == (1024, 768)
    assert activation_text(lora(path)) == "mystyle ü"


def test_without_a_preview_there_is_no_picture_and_small_ones_stay_small(tmp_path):
    path = tmp_path / "a.safetensors"
    write_sidecars(path, trigger="", description="", preview=None, family=SD1)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write_sidecars(path, trigger="", description="", preview=Image.new("RGB", (64, 96)), family=SD1)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 96)


def test_the_owners_word_comes_before_the_makers(tmp_path):
    path = tmp_path / "a.safetensors"
    made = lora(path, modelspec__trigger_phrase="  maker ")
    assert activation_text(made) == "maker"
    for content in ('{"activation text": "owner"}', '\ufeff{"activation text": "owner"}'):
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        assert activation_text(made) == "owner"
    for content in ('{"activation text": ""}', '{"activation text": null}', "[1, 2]"):
        (tmp_path / "a.json").write_text(content)
        assert activation_text(made) == "maker"
    (tmp_path / "a.json").write_text('{"activation text": 5}')
    assert activation_text(made) == ""
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(LoraFileError, match=r"cannot read .*a\.json"):
        activation_text(made)
