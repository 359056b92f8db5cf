"""`sdlora sample` draws, says what it decided and why, overwrites nothing, and refuses what it cannot use."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdlora.adapters import adapters_in
from sdlora.cli.main import main
from sdlora.sampling import pipeline
from sdlora.sampling.infotext import parse_parameters

QUICK = ["--steps", "1", "--width", "64", "--height", "64"]


@pytest.fixture
def lora(tmp_path, tiny_parts, tiny_base):
    """A LoRA file with one strong module, made for the tiny base."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    key = tiny_parts.family.lora_key("denoiser", path)
    out, inputs = tiny_parts.denoiser.get_submodule(path).weight.shape
    rng = torch.Generator().manual_seed(3)
    tensors = {
        f"{key}.lora_down.weight": torch.randn(2, inputs, generator=rng),
        f"{key}.lora_up.weight": torch.randn(out, 2, generator=rng),
        f"{key}.alpha": torch.tensor(2.0),
    }
    metadata = {
        "ss_base_model_version": "sd_v1",
        "sdlora_base": str(tiny_base),
        "ss_clip_skip": "2",
        "sshs_model_hash": "ab" * 32,
        "modelspec.trigger_phrase": "mystyle",
    }
    file = tmp_path / "style.safetensors"
    save_file(tensors, file, metadata)
    return file


def sample(*arguments: object) -> None:
    main(["sample", *QUICK, *map(str, arguments)])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as stop:
        sample(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_base_alone_is_drawn_and_said(tmp_path, tiny_base, capsys):
    sample("--base", tiny_base, "--output", tmp_path / "out", "a castle --d 5 --n dark")
    said = capsys.readouterr().out
    path = tmp_path / "out" / "00001-5.png"
    assert "base alone" in said and f"Base: {tiny_base}" in said and str(path) in said
    with Image.open(path) as image:
        assert image.size == (64, 64)
        prompt, negative, fields = parse_parameters(image.info["parameters"])
    assert (prompt, negative) == ("a castle", "dark")
    assert (fields["Seed"], fields["Steps"], fields["Sampler"]) == ("5", "1", "DPM++ 2M")
    assert fields["CFG scale"] == "1.5"  # the base's own
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize(("options", "prompt", "used"), [(["--cfg", "3"], "a cat", "3"), ([], "a cat --l 7", "7")])
def test_the_guidance_asked_for_counts(tmp_path, tiny_base, options, prompt, used):
    sample("--base", tiny_base, "--output", tmp_path / "out", *options, prompt)
    with Image.open(tmp_path / "out" / "00001-1.png") as image:
        assert parse_parameters(image.info["parameters"])[2]["CFG scale"] == used


def test_numbers_go_on_and_nothing_is_overwritten(tmp_path, tiny_base, capsys):
    for _ in range(2):
        sample("--base", tiny_base, "--output", tmp_path / "out", "--count", "2", "--seed", "8", "a cat")
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == [
        "00001-8.png",
        "00002-9.png",
        "00003-8.png",
        "00004-9.png",
        "grid-00001.png",
        "grid-00002.png",
    ]
    first, again = ((tmp_path / "out" / n).read_bytes() for n in ("00001-8.png", "00003-8.png"))
    assert first == again


def test_prompts_come_from_the_line_and_from_a_file(tmp_path, tiny_base, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("# two\nb (c:1.2)\nd --d 9\n")
    sample("--base", tiny_base, "--output", tmp_path / "out", "--prompts", file, "a " * 80)
    said = capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").glob("0*")) == ["00001-1.png", "00002-1.png", "00003-9.png"]
    assert "Note" not in said  # long prompts are read whole


def test_a_lora_is_drawn_with_its_own_base(tmp_path, lora, tiny_base, capsys):
    sample("--lora", lora, "--output", tmp_path / "with", "a castle")
    said = capsys.readouterr().out
    assert f"Base: {tiny_base} (sdlora_base in style.safetensors" in said
    assert "at strength 1" in said and "Clip skip: 2" in said
    assert "Hint: style.safetensors is called by 'mystyle', which the prompt lacks" in said
    with Image.open(tmp_path / "with" / "00001-1.png") as image:
        prompt, _, fields = parse_parameters(image.info["parameters"])
    assert prompt == "a castle <lora:style:1>"
    assert fields["Lora hashes"] == "style: abababababab" and fields["Clip skip"] == "2"


def test_strength_zero_is_the_base_and_one_is_not(tmp_path, lora, tiny_base, capsys):
    common = ("--clip-skip", "1", "mystyle castle")
    sample("--base", tiny_base, "--output", tmp_path / "base", *common)
    sample("--lora", f"{lora}:0", "--output", tmp_path / "zero", *common)
    sample("--lora", lora, "--output", tmp_path / "one", *common)
    sample("--lora", f"{lora}:0.5", "--lora", f"{lora}:0.5", "--output", tmp_path / "halves", *common)
    assert "Hint" not in capsys.readouterr().out
    base, zero, one, halves = (
        Image.open(tmp_path / n / "00001-1.png").tobytes() for n in ("base", "zero", "one", "halves")
    )
    assert base == zero != one
    assert max(abs(a - b) for a, b in zip(one, halves, strict=True)) <= 1


def test_loras_are_in_the_weights_when_it_draws(tmp_path, lora, monkeypatch):
    drawn = []
    draw = pipeline.draw
    monkeypatch.setattr(
        pipeline, "draw", lambda parts, *rest, **more: drawn.append(parts) or draw(parts, *rest, **more)
    )
    sample("--lora", lora, "--lora", f"{lora}:-0.5", "--output", tmp_path / "out", "mystyle")
    assert not adapters_in(drawn[0].denoiser)


def test_the_trigger_may_stand_beside_the_file(tmp_path, lora, capsys):
    from safetensors import safe_open

    with safe_open(lora, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - it is no mapping
        metadata = file.metadata()
    del metadata["modelspec.trigger_phrase"]
    save_file(tensors, lora, metadata)
    lora.with_suffix(".json").write_text(json.dumps({"activation text": "aquarelle"}))
    sample("--lora", lora, "--output", tmp_path / "out", "a castle")
    assert "'aquarelle'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["--width", "100", "x"], "--width must be a multiple of 8, got 100; 96 would do"),
        (["--sampler", "Eulr", "x"], "did you mean Euler"),
        (["x --zz 1"], "unknown option --zz"),
        (["--prompts", "missing.txt"], "no prompt file missing.txt"),
        (["--lora", "missing.safetensors", "x"], "missing.safetensors"),
        (["--lora", "a.safetensors:much", "x"], "'much'"),
        (["--steps", "0", "x"], "--steps"),
        (["--seed", "-2", "x"], "--seed"),
    ],
)
def test_what_is_wrong_is_refused_with_exit_code_2(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_too_many_steps_are_refused(tmp_path, tiny_base, capsys):
    assert "from 1 to 999" in refused(capsys, "--base", tiny_base, "--output", tmp_path, "x --s 1000")
