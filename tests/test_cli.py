"""The command line as a person meets it: help, errors, exit codes, and every command of the README."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdlora.cli.main import COMMANDS, cli, main
from sdlora.config import all_settings
from sdlora.config_io import load_config
from sdlora.families.save_single import save_single

ROOT = Path(__file__).parent.parent


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs the command line in this process; returns exit code, output and errors."""
    code = 0
    try:
        main(list(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    output, errors = capsys.readouterr()
    return code, output, errors


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder with the example pictures in it, to run commands in."""
    shutil.copytree(ROOT / "datasets_example", tmp_path / "datasets_example")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_commands() -> list[str]:
    """Returns the lines of the README's fenced blocks that name no language: those are for the terminal."""
    commands, fence = [], None
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fence = line.removeprefix("```") if fence is None else None
        elif fence == "":
            commands.append(line)
    return commands


SHORT = ["--steps", "2", "--sample-every", "0", "--rank", "2", "--base", "nano"]


@pytest.mark.parametrize("command", [[], *[[name] for name in COMMANDS]], ids=lambda c: c[0] if c else "sdlora")
def test_help(capsys, command):
    code, output, _ = run(capsys, *command, "--help")
    assert code == 0
    assert output.startswith("Usage: sdlora")
    assert "\b" not in output and "\\b" not in output


def test_train_help_shows_at_most_a_dozen_options_and_help_all_shows_every_setting(capsys):
    _, output, _ = run(capsys, "train", "--help")
    options = re.findall(r"^  (?:-\w, )?--[\w-]+", output, re.MULTILINE)
    assert len(options) <= 12
    _, everything, _ = run(capsys, "train", "--help-all")
    assert all(s.flag in everything for s in all_settings())
    assert len(re.findall(r"^  --", everything, re.MULTILINE)) == len(list(all_settings()))


def test_version(capsys):
    import sdlora

    assert sdlora.__version__ in run(capsys, "--version")[1]


def test_every_setting_is_a_flag(capsys):
    command = cli.get_command(None, "train")  # type: ignore[arg-type]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    assert {s.flag for s in all_settings()} <= flags


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["train", "--rnak", "3"], "--rank"),
        (["tarin"], "train"),
        (["train"], "give --images"),
        (["train", "--images", "nowhere"], "no folder nowhere"),
        (["train", "--images", "empty"], "empty"),
        (["train", "--images", "letters"], "letter"),
        (["train", "--images", "datasets_example", "--rank", "0"], "lora.rank must be at least 1, got 0"),
        (["train", "--images", "datasets_example", "--learning-rate", "-1"], "must be above 0, got -1"),
        (["train", "--images", "datasets_example", "--base", "nonsense"], "no base model 'nonsense'"),
        (["train", "--images", "datasets_example", "--base", "a/b"], "--base nano"),
        (["train", "--images", "datasets_example", "--set", "lora.rnak=3"], "did you mean lora.rank?"),
        (["train", "--images", "datasets_example", "--config", "none.toml"], "no configuration file none.toml"),
        (["train", "--images", "datasets_example", "--output", "letters"], "is not empty"),
        (["train", "--resume", "nowhere"], "no run there"),
        (["sample", "--lora", "nowhere.safetensors", "a castle"], "nowhere.safetensors"),
        (["sample", "--lora", "letters/letter.txt", "a castle"], "letter.txt"),
        (["sample", "--base", "nano", "a castle --zz 3"], "zz"),
        (["inspect", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_mistakes_get_a_clear_error(capsys, workplace, arguments, match):
    (workplace / "empty").mkdir()
    (workplace / "letters").mkdir()
    (workplace / "letters" / "letter.txt").write_text("dear")
    code, _, errors = run(capsys, *arguments)
    assert code == 2
    assert match in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 4


def test_debug_shows_the_traceback(workplace):
    from sdlora.errors import DatasetError

    with pytest.raises(DatasetError):
        main(["train", "--images", "nowhere", "--debug"])


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("bear.txt", b"b\xe4r", "UTF-8"),
        ("bear.txt", b"  \n", "empty"),
        ("bear.png", b"no picture", "1 unreadable (bear.png)"),
    ],
)
def test_damaged_files_are_named(capsys, workplace, name, content, match):
    (workplace / "datasets_example" / name).write_bytes(content)
    code, output, errors = run(capsys, "train", "--images", "datasets_example", *SHORT)
    assert match in output + errors
    assert "bear" in output + errors
    assert code == (2 if name.endswith(".txt") else 0)  # an unreadable picture is skipped and named


def test_defaults_are_a_configuration(capsys, tmp_path):
    file = tmp_path / "defaults.toml"
    file.write_text(run(capsys, "defaults")[1])
    assert load_config(file) == load_config()


def test_the_second_run_encodes_nothing(capsys, workplace, monkeypatch):
    monkeypatch.setenv("SDLORA_CACHE", str(workplace / "cache"))
    run(capsys, "train", "--images", "datasets_example", *SHORT, "--output", "one")
    latents = {p: p.stat().st_mtime_ns for p in (workplace / "cache").rglob("*.safetensors")}
    assert len(latents) >= 30
    run(capsys, "train", "--images", "datasets_example", *SHORT, "--output", "two")
    assert all(p.stat().st_mtime_ns == time for p, time in latents.items())
    assert not list((workplace / "datasets_example").glob("*.safetensors"))


def test_a_run_stopped_in_the_middle_says_how_to_go_on(capsys, workplace):
    code, output, _ = run(capsys, "train", "--images", "datasets_example", *SHORT, "--output", "a b", "--stop-at", "1")
    assert code == 0
    command = re.search(r"sdlora (train --resume .+)", output)
    assert command
    code, output, _ = run(capsys, *shlex.split(command[1]))
    assert code == 0
    assert "Resumed at step 1 of 2" in output


def test_training_ends_with_the_line_that_asks_as_it_was_taught(capsys, workplace):
    called = ("--trigger", "shiny", "--trigger-place", "end")
    code, output, _ = run(capsys, "train", "--images", "datasets_example", *SHORT, "--output", "my run", *called)
    assert code == 0
    said, words = output.splitlines()[-1].split(": ", 1)
    assert said == "Draw" and words.endswith(" 'a castle, shiny'")
    assert run(capsys, *shlex.split(words)[1:], "--steps", "2")[0] == 0


def test_demo_leaves_a_grid(capsys, workplace):
    code, output, _ = run(capsys, "demo", "--steps", "1")
    assert code == 0
    grid = Path("runs/demo/grid.png")
    assert str(grid) in output
    assert "'a castle, sks style'" in output
    with Image.open(grid) as image:
        assert image.height > 8 * 128
    assert (workplace / "runs" / "demo" / "demo.safetensors").is_file()


def test_every_readme_command_runs(capsys, workplace, tiny_sd1):
    commands = readme_commands()[2:]  # the first two are run by .ci/run
    assert len(commands) >= 14
    assert run(capsys, "demo", "--steps", "1")[0] == 0
    save_single(tiny_sd1, workplace / "model.safetensors")
    (workplace / "stable-diffusion-webui" / "models" / "Stable-diffusion").mkdir(parents=True)
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "sdlora", command
        target = None
        if ">" in words:
            words, target = words[: words.index(">")], words[-1]
        if words[1] == "train" and "--base" in words:
            words += [*SHORT[:-2], "--resolution", "64", "--learning-rate", "0.01"]
        elif words[1] == "train":
            words += [*SHORT, "--output", f"runs/{len(list(Path('runs').iterdir()))}"]
        if words[1] == "sample":
            words += ["--steps", "2"] if "--s" not in command else []
        if "--processes" in words:  # which start the command line that the program was started with
            done = subprocess.run([sys.executable, "-m", "sdlora", *words[1:]], capture_output=True, text=True)
            code, output, errors = done.returncode, done.stdout, done.stderr
        else:
            code, output, errors = run(capsys, *words[1:])
        assert code == 0, f"{command}\n{output}\n{errors}"
        if target:
            Path(target).write_text(output)


def test_nothing_is_sent_anywhere(capsys, workplace, monkeypatch):
    """No connection is even tried by training and drawing on the embedded base, and telemetry is off."""

    def refuse(self, address):
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run(capsys, "train", "--images", "datasets_example", *SHORT, "--output", "run")[0] == 0
    assert run(capsys, "sample", "--lora", "run/datasets_example.safetensors", "--steps", "2", "a castle")[0] == 0
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_inspect_reads_what_training_wrote(capsys, workplace):
    run(capsys, "train", "--images", "datasets_example", *SHORT, "--output", "run", "--trigger", "shiny")
    code, output, _ = run(capsys, "inspect", "run/datasets_example.safetensors", "--json")
    assert code == 0
    assert "shiny" in json.dumps(json.loads(output))
