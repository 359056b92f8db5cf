"""Prompt lines are read as sd-scripts reads them, and nothing in them is ignored in silence."""

from pathlib import Path

import pytest

from sdlora.errors import ConfigError
from sdlora.sampling.prompts import Prompt, parse_lora_spec, parse_prompt, read_prompts, resolve


def test_a_plain_line_leaves_everything_open():
    assert parse_prompt(" a castle, high-key -- \n".replace(" -- ", "")) == Prompt("a castle, high-key")


def test_every_option():
    line = "a castle on a hill --w 512 --h 768 --d 7 --l 7.5 --s 30 --n blurry, low quality --ss Euler a"
    assert parse_prompt(line) == Prompt(
        "a castle on a hill", "blurry, low quality", width=512, height=768, seed=7, cfg=7.5, steps=30, sampler="Euler a"
    )


def test_options_may_come_without_a_text():
    assert parse_prompt("--d 3") == Prompt("", seed=3)


@pytest.mark.parametrize(("given", "side"), [(515, 512), (100, 96), (20, 64), (64, 64)])
def test_sizes_are_rounded_down_to_eights_and_it_is_said(given, side):
    prompt = parse_prompt(f"x --w {given}")
    assert prompt.width == side
    assert bool(prompt.notes) == (given != side)
    assert all(f"--w {given} became {side}" in note for note in prompt.notes)


def test_weights_stay_in_the_text_and_are_no_cause_for_a_note():
    prompt = parse_prompt("a (cat:1.2) BREAK [red] --n (dog:0.5)")
    assert (prompt.text, prompt.negative, prompt.notes) == ("a (cat:1.2) BREAK [red]", "(dog:0.5)", ())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a --width 512", r"unknown option --width .*the width in pixels is --w"),
        ("a --step 20", r"the steps is --s"),
        ("a --q 1", r"unknown option --q .*known: --w"),
        ("a --cn pose.png", r"--cn .*ControlNet picture is not supported"),
        ("a -- b", r"unknown option --b"),
        ("a --w", r"--w .*whole number from 1 to 4096, got ''"),
        ("a --w 51x", r"--w .*got '51x'"),
        ("a --s 0", r"--s .*from 1 to 1000, got '0'"),
        ("a --s 1001", r"--s .*from 1 to 1000"),
        ("a --d -1", r"--d .*got '-1'"),
        ("a --d 4294967296", r"--d .*from 0 to 4294967295"),
        ("a --l nan", r"--l .*from 1 to 50, got 'nan'"),
        ("a --l 0.5", r"--l .*from 1 to 50"),
        ("a --ss Eulr a", r"unknown sampler 'Eulr a'; did you mean Euler a\?"),
        ("a --w 64 --w 64", r"--w .*twice"),
        ("a <lora:x:1>", r"LoRA tags have no effect .*--lora"),
    ],
)
def test_what_is_wrong_is_named(line, message):
    with pytest.raises(ConfigError, match=message):
        parse_prompt(line)


def test_a_file_skips_blank_lines_and_comments(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# mine\n\na castle --d 1\n  # not this\nein Schloß\n", encoding="utf-8")
    assert read_prompts(file) == [Prompt("a castle", seed=1), Prompt("ein Schloß")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no prompt file .*prompts.txt"),
        (b"# nothing\n\n", "holds no prompt"),
        ("caf\u00e9".encode("latin-1"), "not UTF-8"),
        (b"fine\n\nbad --zz 1\n", r"prompts.txt, line 3: unknown option --zz"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_prompts(file)


def test_a_folder_is_no_prompt_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the prompt file"):
        read_prompts(tmp_path)


def test_resolve_fills_only_what_is_open():
    defaults = Prompt("ignored", "blurry", 64, 64, 1, 5.0, 20, "Euler")
    assert resolve(Prompt("a", "dark", 128, cfg=2.0), defaults) == Prompt("a", "dark", 128, 64, 1, 2.0, 20, "Euler")
    assert resolve(Prompt("a"), defaults).negative == "blurry"
    full = resolve(Prompt("a"), defaults)
    assert resolve(full, Prompt("", "x", 8, 8, 9, 9.0, 9, "DDIM")) == full


def test_resolve_keeps_a_seed_of_zero():
    assert resolve(Prompt("a", seed=0), Prompt("", seed=5)).seed == 0


@pytest.mark.parametrize(
    ("spec", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("style.safetensors:-1", "style.safetensors", -1.0),
        ("style.safetensors:0", "style.safetensors", 0.0),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:0.5", r"C:\loras\style.safetensors", 0.5),
        ("folder:2/style", "folder:2/style", 1.0),
    ],
)
def test_lora_specs(spec, path, strength):
    assert parse_lora_spec(spec) == (Path(path), strength)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("a.safetensors:nan", "not finite"),
        ("a.safetensors:inf", "not finite"),
        ("a.safetensors:0,8", "'0,8' .*is no number"),
        ("a.safetensors:", "'' .*is no number"),
        (":0.8", "names no file"),
        ("", "names no file"),
    ],
)
def test_bad_lora_specs(spec, message):
    with pytest.raises(ConfigError, match=message):
        parse_lora_spec(spec)


@pytest.mark.parametrize("text", ["a [cat:dog:0.5]", "a [cat|dog]", "a cat AND a dog", "a [cat:0.5]"])
def test_what_the_webui_does_over_time_is_told_to_have_no_such_effect(text):
    [note] = parse_prompt(text).notes
    assert "read as plain words" in note


def test_weights_and_escaped_brackets_need_no_note():
    assert parse_prompt(r"a (cat:1.2) [dog] \[x:0.5\] SAND").notes == ()


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(ConfigError, match="no text"):
        parse_prompt("a \udcff cat")
