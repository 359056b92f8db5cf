"""A run that is killed outright goes on from its last checkpoint and ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from sdlora.config_io import load_config, to_toml
from sdlora.training.folder import reopen
from sdlora.training.train import train


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_killed_run_goes_on_bit_for_bit(tiny_base, style_dir, tmp_path, delay):
    flags = {
        "base.model": str(tiny_base),
        "data.images": style_dir,
        "data.batch_size": 2,
        "lora.rank": 2,
        "train.epochs": 12,
        "output.save_every": 1,
        "samples.sample_every": 0,
    }
    config = load_config(None, flags | {"output.output": tmp_path / "killed"})
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "sdlora", "train", "--config", str(tmp_path / "config.toml")],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*/state.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()

    run, resumed_config = reopen(tmp_path / "killed", {}, ())
    resumed = train(resumed_config, resume=run)
    straight = train(load_config(None, flags | {"output.output": tmp_path / "straight"}))
    a, b = load_file(resumed.lora), load_file(straight.lora)
    assert resumed.steps == straight.steps
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
