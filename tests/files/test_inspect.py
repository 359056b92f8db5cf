"""`sdlora inspect` says the truth about a file, in lines and in JSON, and lets no stranger's text near the terminal."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.cli.main import main
from sdlora.files.kohya import module_names, write_lora
from sdlora.files.sidecars import write_sidecars


@pytest.fixture
def written(tmp_path, tiny_parts, adapt):
    adapters = adapt(tiny_parts, "attention")
    path = tmp_path / "style.safetensors"
    metadata = {**tiny_parts.family.metadata, "ss_output_name": "style", "ss_steps": "30", "ss_clip_skip": "None"}
    write_lora(path, adapters, tiny_parts.family, metadata, torch.float16)
    write_sidecars(path, trigger="mystyle", description="", preview=None, family=tiny_parts.family)
    return path, module_names(adapters, tiny_parts.family)


def inspect(capsys, path, *options: str) -> str:
    main(["inspect", str(path), *options])
    return capsys.readouterr().out


def test_json_holds_what_is_true(capsys, written):
    path, named = written
    report = json.loads(inspect(capsys, path, "--json"))
    expected = {
        "format": "kohya LoRA, safetensors",
        "dtype": "fp16",
        "bytes": path.stat().st_size,
        "looks_like": "unknown",  # no Stable Diffusion attends to texts of width 16
        "base_version": "sd_v1",
        "trigger": "mystyle",
        "alias": "style",
        "a1111": "SD1",
        "forge": "SD1",
        "training": {"steps": "30"},
        "notes": [],
    }
    assert {key: report[key] for key in expected} == expected
    assert report["hash"]["matches"] and report["hash"]["stored"] == report["metadata"]["sshs_model_hash"]
    assert set(report["components"]) == {"denoiser", "text encoder"}
    for prefix, component in {"lora_te_": "text encoder", "lora_unet_": "denoiser"}.items():
        facts = report["components"][component]
        members = {name: adapter for name, adapter in named.items() if name.startswith(prefix)}
        assert (facts["modules"], facts["ranks"], facts["alphas"], facts["scales"]) == (len(members), [3], [1.5], [0.5])
        norms = {name: torch.linalg.vector_norm(a.delta_weight()).item() for name, a in members.items()}
        strongest = sorted(norms, key=lambda name: -norms[name])[:5]
        assert list(facts["strongest"]) == strongest
        assert list(facts["strongest"].values()) == pytest.approx([norms[name] for name in strongest], rel=1e-3)
        assert facts["norm"] == pytest.approx(sum(n * n for n in norms.values()) ** 0.5, rel=1e-3)


def test_lines_say_it_for_people(capsys, written):
    said = inspect(capsys, written[0])
    for line in (
        r"Trigger:              mystyle",
        r"In a prompt:          <lora:style:1>",
        r"Listed as:            SD1 in AUTOMATIC1111, SD1 in Forge",
        r"Denoiser: 128 modules, rank 3, alpha 1.5, scale 0.5",
        r"Text encoder: 18 modules, rank 3, alpha 1.5, scale 0.5",
        "sshs_model_hash matches the tensors",
    ):
        assert line in said


def test_what_may_surprise_is_noted(capsys, written, tmp_path):
    tensors = {key: t for key, t in load_file(written[0]).items() if not key.endswith("attn1_to_q.alpha")}
    path = tmp_path / "renamed.safetensors"
    save_file(tensors, path, {"ss_output_name": "other", "sshs_model_hash": "ab" * 32, "ss_v2": "True"})
    said = inspect(capsys, path)
    assert "16 of 146 modules have no alpha" in said
    assert "sshs_model_hash is not that of its tensors" in said and "does NOT match" in said
    assert "the WebUI calls it other" in said
    assert "rank 3, alpha 1.5 or 3, scale 0.5 or 1" in said


def test_a_file_that_hides_from_its_own_base_is_noted(capsys, tmp_path):
    key = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{key}.lora_down.weight": torch.ones(1, 2048), f"{key}.lora_up.weight": torch.ones(640, 1)}
    path = tmp_path / "xl.safetensors"
    save_file(tensors, path, {"format": "pt"})
    notes = json.loads(inspect(capsys, path, "--json"))["notes"]
    assert "AUTOMATIC1111 takes it for SD1 and hides it while a model of another kind is loaded" in notes
    assert "Forge cannot tell its kind from the metadata; it is listed as Unknown" in notes


def test_no_control_character_of_a_stranger_reaches_the_terminal(capsys, written, tmp_path):
    path = tmp_path / "evil.safetensors"
    evil = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\u202e\r\n"
    keys = ("ss_output_name", "modelspec.trigger_phrase", "ss_sd_model_name", "ss_base_model_version", "ss_steps")
    tensors = {key.replace("lora_unet_", "lora_unet_\x1b[31m"): t for key, t in load_file(written[0]).items()}
    save_file(tensors, path, {key: evil for key in keys})
    for said in (inspect(capsys, path), inspect(capsys, path, "--json")):
        assert all(c.isprintable() or c == "\n" for c in said)
    assert "[red]x[/red]" in inspect(capsys, path)


def test_what_cannot_be_read_ends_with_code_2_and_the_reason(capsys, tmp_path):
    path = tmp_path / "page.safetensors"
    path.write_text("<html>not found</html>")
    with pytest.raises(SystemExit) as stop:
        inspect(capsys, path)
    assert stop.value.code == 2
    assert "is a web page, not a model" in capsys.readouterr().err


def test_no_model_library_is_loaded_for_it(written):
    code = (
        "import sys; from sdlora.cli.main import main; main(sys.argv[1:]); "
        "sys.exit(any(m.partition('.')[0] in ('diffusers', 'transformers') for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(written[0])], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
