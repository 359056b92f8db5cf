"""What the command line imports before the first step, and that nothing is left half imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

UNWANTED = """
import json, sys
from sdlora.cli.main import main
main(sys.argv[1:])
unwanted = {"torch._dynamo", "sympy", "peft", "diffusers.models.transformers.transformer_flux"}
print(json.dumps(sorted(unwanted & sys.modules.keys())))
"""

AFTERWARDS = """
from sdlora.cli.startup import import_models
assert import_models()
import torch._dynamo, diffusers, transformers, peft
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
assert diffusers.UNet2DConditionModel is UNet2DConditionModel
from transformers.models.clip.modeling_clip import CLIPTextModel
assert transformers.CLIPTextModel is CLIPTextModel
assert torch._dynamo.is_compiling() is False and callable(peft.LoraConfig)
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.SGD([weight], lr=0.5)
weight.grad = torch.ones(2)
optimizer.step()
assert weight.tolist() == [0.5, 0.5]
"""


def python(code, *arguments, folder):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_commands_wait_for_no_library_that_they_do_not_use(tmp_path):
    train = ("train", "--base", "nano", "--images", ROOT / "datasets_example", "--output", tmp_path / "run")
    train += ("--steps", 1, "--sample-every", 0)
    sample = ("sample", "a castle", "--lora", tmp_path / "run" / "datasets_example.safetensors", "--steps", 2)
    for command in (train, sample):
        done = python(UNWANTED, *command, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == []


def test_libraries_are_whole_afterwards(tmp_path):
    done = python(AFTERWARDS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
