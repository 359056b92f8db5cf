"""`sdlora lora` lists its commands at once, and brings along no more than each needs."""

import subprocess
import sys

import pytest
import torch
from files.random_lora import random_module

from sdlora.cli.lora import COMMANDS
from sdlora.cli.main import main
from sdlora.files.kohya import write_modules


def heavy(*arguments: str) -> set[str]:
    """Runs a command in a fresh interpreter; returns which large libraries it imported."""
    code = (
        "import sys\nfrom sdlora.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print(*{m.partition('.')[0] for m in sys.modules} & {'torch', 'diffusers', 'transformers'})"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main(["lora", name, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Usage: sdlora lora {name} ")
    assert "\b" not in said and "\\b" not in said


def test_a_mistyped_command_is_told_the_near_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["lora", "marge"])
    assert stop.value.code == 2
    assert "no command 'marge'; did you mean merge?" in capsys.readouterr().err


def test_help_brings_nothing_along_and_resizing_no_model_library(tmp_path):
    assert heavy("lora", "--help") == set()
    assert heavy("lora", "merge", "--help") == set()
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    source = tmp_path / "style.safetensors"
    write_modules(source, {name: random_module(name, (8, 768), 2, 1.0, 0.2, 0)}, {}, torch.float32)
    assert heavy("lora", "resize", str(source), str(tmp_path / "small.safetensors"), "--rank", "1") == {"torch"}


def test_a_link_to_itself_is_no_file_and_no_traceback(tmp_path, capsys):
    link = tmp_path / "l.safetensors"
    link.symlink_to(link)
    with pytest.raises(SystemExit) as stop:
        main(["lora", "resize", str(link), str(tmp_path / "o.safetensors"), "--rank", "1"])
    assert stop.value.code == 2
    assert "no LoRA file" in capsys.readouterr().err
