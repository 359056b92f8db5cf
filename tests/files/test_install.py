"""A LoRA is put where its program looks for it, with what belongs to it, and nothing is lost on the way."""

import json

import pytest
import torch
from click.testing import CliRunner

from sdlora.cli.lora_install import command
from sdlora.errors import LoraFileError, TrainingError
from sdlora.files.install import PROGRAMS, find_program, install
from sdlora.files.kohya import ModuleWeights, write_modules
from sdlora.files.loaders import LOADERS

LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def style(tmp_path):
    """A LoRA for SD 1.x with its two side files."""
    path = tmp_path / "out" / "style.safetensors"
    weights = ModuleWeights(torch.ones(1, 768), torch.ones(1280, 1), 1.0)
    write_modules(path, {LAYER: weights}, {"ss_base_model_version": "sd_v1", "ss_output_name": "run7"}, torch.float32)
    path.with_suffix(".json").write_text(json.dumps({"activation text": "mystyle"}))
    path.with_suffix(".png").write_bytes(b"a picture")
    return path


def program(root, *marks):
    for mark in marks:
        target = root / mark
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch() if "." in target.name else target.mkdir()
    return root


@pytest.mark.parametrize(
    ("marks", "name", "folder"),
    [
        (("models/Stable-diffusion",), "AUTOMATIC1111", "models/Lora"),
        (("webui.py", "modules"), "AUTOMATIC1111", "models/Lora"),
        (("launch.py",), "AUTOMATIC1111", "models/Lora"),
        (("webui.py", "modules_forge", "models/Stable-diffusion"), "Forge", "models/Lora"),
        (("comfy", "main.py"), "ComfyUI", "models/loras"),
        (("models/checkpoints", "models/loras"), "ComfyUI", "models/loras"),
    ],
)
def test_the_program_is_told_by_what_is_in_its_folder(tmp_path, style, marks, name, folder):
    root = program(tmp_path / "webui", *marks)
    done = install(style, root)
    assert (done.program.name, done.folder) == (name, root / folder)
    assert {path.name for path in done.written} == {"style.safetensors", "style.json", "style.png"}
    assert {path.name for path in (root / folder).iterdir()} == {"style.safetensors", "style.json", "style.png"}
    assert (root / folder / "style.safetensors").read_bytes() == style.read_bytes()


def test_every_program_has_its_rules():
    assert {p.name for p in PROGRAMS} == LOADERS.keys() - {"diffusers"}


def test_the_folder_above_and_the_folder_of_loras_will_do(tmp_path):
    root = program(tmp_path / "portable" / "ComfyUI", "comfy", "models/loras")
    for path in (root, root.parent, root / "models" / "loras"):
        found, at = find_program(path)
        assert found.name == "ComfyUI" and at.resolve() == root.resolve()
    with pytest.raises(LoraFileError, match="found none of ComfyUI, Forge, AUTOMATIC1111 in"):
        find_program(root / "models")


def test_two_programs_in_one_folder_are_not_guessed_between(tmp_path):
    program(tmp_path, "ComfyUI/comfy", "webui/webui.py")
    with pytest.raises(LoraFileError, match="has ComfyUI and webui in it; give the one you mean"):
        find_program(tmp_path)


def test_invokeai_wants_to_be_told_itself(tmp_path, style):
    root = program(tmp_path / "invoke", "invokeai.yaml", "models")
    with pytest.raises(LoraFileError, match="keeps its models in a database; open its Model Manager"):
        install(style, root)


@pytest.mark.parametrize(("path", "match"), [("gone", "is no folder"), ("empty", "found none of ComfyUI, Forge")])
def test_where_there_is_no_program_nothing_is_written(tmp_path, style, path, match):
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoraFileError, match=match):
        install(style, tmp_path / path)
    assert not list((tmp_path / "empty").iterdir())


def test_another_file_of_the_name_is_kept_unless_forced(tmp_path, style):
    root = program(tmp_path / "webui", "webui.py")
    folder = root / "models" / "Lora"
    folder.mkdir(parents=True)
    (folder / "style.safetensors").write_bytes(b"somebody's work")
    with pytest.raises(LoraFileError, match=r"has another style.safetensors already; rename yours, or .* --force"):
        install(style, root)
    assert [path.name for path in folder.iterdir()] == ["style.safetensors"]
    assert (folder / "style.safetensors").read_bytes() == b"somebody's work"
    install(style, root, force=True)
    assert (folder / "style.safetensors").read_bytes() == style.read_bytes()


def test_a_second_time_nothing_is_copied(tmp_path, style):
    root = program(tmp_path / "webui", "webui.py")
    install(style, root)
    again = install(style, root)
    assert again.written == () and len(again.unchanged) == 3
    (root / "models" / "Lora" / "style.json").write_text("{}")  # edited in the WebUI
    with pytest.raises(LoraFileError, match=r"has another style.json already"):
        install(style, root)


def test_a_full_disk_leaves_no_half_file(tmp_path, style, monkeypatch):
    root = program(tmp_path / "webui", "webui.py")

    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdlora.files.install.shutil.copyfile", full)
    with pytest.raises(TrainingError, match="no space left on the disk"):
        install(style, root)
    assert not list((root / "models" / "Lora").iterdir())


def test_a_file_that_would_not_be_listed_is_refused(tmp_path, style):
    other = style.rename(style.with_suffix(".bin"))
    with pytest.raises(LoraFileError, match=r"programs look for \.safetensors files"):
        install(other, program(tmp_path / "webui", "webui.py"))


def test_the_command_says_where_it_went_and_how_to_call_it(tmp_path, style):
    root = program(tmp_path / "webui", "webui.py")
    result = CliRunner().invoke(command, [str(style), "--webui", str(root)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "Copied style.safetensors, style.json, style.png",
        f"  in {root / 'models' / 'Lora'} (AUTOMATIC1111)",
        "In a prompt: <lora:run7:1> mystyle",
    ]


def test_the_command_speaks_comfyuis_language(tmp_path, style):
    root = program(tmp_path / "ComfyUI", "comfy")
    style.with_suffix(".json").unlink()
    result = CliRunner().invoke(command, [str(style), "--webui", str(root)], catch_exceptions=False)
    assert 'Choose style in a "Load LoRA" node; in a prompt: (it has no trigger word)' in result.output


def test_the_command_warns_of_what_the_program_will_not_read(tmp_path):
    path = tmp_path / "odd.safetensors"
    pair = {LAYER: ((1, 768), (1280, 1)), "lora_te_encoder_layers_0_mlp_fc1": ((1, 768), (3072, 1))}
    modules = {name: ModuleWeights(torch.ones(down), torch.ones(up), 1.0) for name, (down, up) in pair.items()}
    write_modules(path, modules, {}, torch.float32)
    result = CliRunner().invoke(
        command, [str(path), "--webui", str(program(tmp_path / "webui", "webui.py"))], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert "Note: AUTOMATIC1111 leaves 3 of its 6 keys unused; the first is lora_te_encoder_layers_0" in result.output


def test_a_damaged_file_is_not_passed_on(tmp_path, style):
    style.write_bytes(style.read_bytes()[:-1])
    root = program(tmp_path / "webui", "webui.py")
    result = CliRunner().invoke(command, [str(style), "--webui", str(root)])
    assert isinstance(result.exception, LoraFileError)
    assert not (root / "models").exists()
