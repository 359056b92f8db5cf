"""`sdlora lora check` shows the certificate, and its exit code says whether all is well."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sdlora.cli.lora_check import command
from sdlora.errors import LoraFileError
from sdlora.families import FAMILIES
from sdlora.files.convert import convert
from sdlora.files.kohya import read_lora, write_lora


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def sd15(tmp_path, modules):
    """A small file with real names and widths: the middle block and one layer of the text encoder."""
    chosen = {n: s for n, s in modules("sd15").items() if "mid_block" in n or "layers_3_" in n}
    tensors = {}
    for name, shape in chosen.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, *shape[1:]) / 100
        tensors[f"{name}.lora_up.weight"] = torch.ones(shape[0], 1, *[1 for _ in shape[2:]])
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    path = tmp_path / "style.safetensors"
    save_file(tensors, path, {"ss_output_name": "style", **FAMILIES["sd1"].metadata})
    return path


def change(path, edit, **metadata):
    save_file(edit(load_file(path)), path, {**FAMILIES["sd1"].metadata, **metadata})


def test_a_good_file(sd15):
    result = run(sd15)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "style.safetensors: 54 keys, held against Stable Diffusion 1.x, text width 768"
    assert lines[2].split() == ["Program", "Version", "Used", "Left", "Listed", "as", "Verdict"]
    assert [line.split()[0] for line in lines[3:]] == ["AUTOMATIC1111", "Forge", "ComfyUI", "diffusers", "InvokeAI"]
    assert all(line.endswith("loads whole") for line in lines[3:])


def test_a_file_that_some_program_loses_a_part_of(sd15):
    change(sd15, lambda tensors: {key.replace("te_text_model_", "te_"): t for key, t in tensors.items()})
    result = run(sd15)
    assert result.exit_code == 1
    rows = {line.split()[0]: line for line in result.output.splitlines()[3:8]}
    assert rows["AUTOMATIC1111"].endswith("18 keys lost") and rows["diffusers"].endswith("loads whole")
    assert rows["Forge"].endswith("refuses the file")
    assert "no place for: lora_te_encoder_layers_3_mlp_fc1.alpha" in result.output
    assert "no place for: and 15 more, which --json lists" in result.output


def test_converting_is_advised_where_it_helps_and_it_does(sd15, tmp_path):
    change(sd15, lambda tensors: {key.replace("te_text_model_", "te_"): t for key, t in tensors.items()})
    assert f"`sdlora lora convert {sd15} NEW.safetensors` makes a file of it that all" in run(sd15).output
    (new,) = convert(read_lora(sd15), tmp_path / "new.safetensors", "kohya")
    result = run(new)
    assert result.exit_code == 0 and "sdlora lora convert" not in result.output


def test_converting_is_not_advised_where_it_does_not_help(sd15):
    stray = "lora_unet_mid_block_attentions_7_proj_in"
    factors = {f"{stray}.lora_down.weight": torch.ones(1, 4), f"{stray}.lora_up.weight": torch.ones(4, 1)}
    change(sd15, lambda tensors: {**tensors, **factors})
    result = run(sd15)
    assert result.exit_code == 1 and "sdlora lora convert" not in result.output


def test_json_lists_everything(sd15):
    change(sd15, lambda tensors: {key.replace("te_text_model_", "te_"): t for key, t in tensors.items()})
    result = run(sd15, "--json")
    assert result.exit_code == 1
    rows = {row["program"]: row for row in json.loads(result.output)["programs"]}
    assert len(rows["ComfyUI"]["left"]) == 18 and rows["ComfyUI"]["class"] is None
    assert (rows["Forge"]["loads"], rows["diffusers"]["loads"]) == (False, True)


def test_a_file_for_a_base_of_ones_own(tmp_path, tiny_base, tiny_parts, adapt):
    path = tmp_path / "style.safetensors"
    write_lora(path, adapt(tiny_parts), tiny_parts.family, {}, torch.float32)
    with pytest.raises(LoraFileError, match="does not tell what model it is for; name that with --base"):
        CliRunner().invoke(command, [str(path)], catch_exceptions=False)
    result = run(path, "--base", tiny_base)
    assert result.exit_code == 0, result.output
    assert "names fit, no such base" in result.output and "no base of text width 16" in result.output


def test_a_file_for_the_embedded_base(tmp_path, nano_parts, adapt):
    path = tmp_path / "style.safetensors"
    write_lora(path, adapt(nano_parts, "attention"), nano_parts.family, {}, torch.float16)
    result = run(path)
    assert result.exit_code == 0, result.output
    assert "held against Stable Diffusion 1.x, text width 128" in result.output
    assert result.output.count("names fit, no such base") == 4


def test_another_base_than_the_files(sd15):
    result = run(sd15, "--base", "nano")
    assert result.exit_code == 1
    assert "do not fit" in result.output


def test_damage_is_found_by_reading_the_values(sd15):
    def poison(tensors):
        next(t for key, t in tensors.items() if key.endswith("lora_up.weight"))[:] = float("nan")
        return tensors

    change(sd15, poison)
    result = run(sd15)
    assert isinstance(result.exception, LoraFileError) and "not a number" in str(result.exception)
    assert "loads whole" in result.output  # by their names all is well


def test_what_is_no_lora_file_is_an_error(tmp_path):
    path = tmp_path / "page.safetensors"
    path.write_text("<html>log in</html>")
    result = run(path)
    assert isinstance(result.exception, LoraFileError) and not result.output


def test_strangers_texts_are_made_harmless(sd15):
    change(sd15, lambda tensors: {**tensors, "lora_te_\x1b[2J.lora_up.weight": torch.ones(2, 2)})
    result = run(sd15)
    assert isinstance(result.exception, LoraFileError)
    assert "\x1b" not in result.output and "lora_te_ [2J.lora_up.weight" in result.output
