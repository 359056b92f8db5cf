"""One process writes a run's folder at a time, and tells how far it is."""

import json
import os
import signal
import subprocess
import sys

import pytest

from sdlora.config_io import load_config
from sdlora.errors import ConfigError
from sdlora.training.folder import reopen
from sdlora.training.lock import HEARTBEAT, Heartbeat, Lock, owner
from sdlora.training.train import train

HOLD = """
import sys, time
from pathlib import Path
from sdlora.training.lock import Heartbeat, Lock
lock = Lock()
lock.take(Path(sys.argv[1]))
Heartbeat(Path(sys.argv[1]), 100).beat(7)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_that_another_process_writes_is_refused_and_its_owner_named(tmp_path, holder):
    with pytest.raises(ConfigError, match=rf"is in use: process {holder.pid} on .* at step 7 of 100 \d+ s ago"):
        Lock().take(tmp_path)


def test_the_lock_of_a_dead_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock = Lock()
    lock.take(tmp_path)
    lock.release()


def test_a_lock_that_was_let_go_is_free(tmp_path):
    first, second = Lock(), Lock()
    first.take(tmp_path)
    with pytest.raises(ConfigError, match="another process trains there"):
        second.take(tmp_path)
    first.release()
    second.take(tmp_path)
    second.release()


def test_signs_of_life_come_every_few_seconds_and_at_every_change(tmp_path):
    now = [0.0]
    heart = Heartbeat(tmp_path, 10, lambda: now[0])

    def last():
        sign = json.loads((tmp_path / HEARTBEAT).read_text())
        return sign["step"], sign["state"]

    heart.beat(1)
    now[0] = 4.9
    heart.beat(2)
    assert last() == (1, "running")
    now[0] = 5.1
    heart.beat(3)
    assert last() == (3, "running")
    heart.beat(4, "finished")
    assert last() == (4, "finished")
    assert f"process {os.getpid()}" in owner(tmp_path) and "step 4 of 10" in owner(tmp_path)


def test_a_run_that_is_being_trained_is_not_resumed_by_another(tiny_base, style_dir, tmp_path):
    flags = {"base.model": str(tiny_base), "data.images": style_dir, "lora.rank": 2, "train.epochs": 2}
    flags |= {"samples.sample_every": 0, "output.output": tmp_path / "run", "train.stop_at": 1}
    half = train(load_config(None, flags))
    run, config = reopen(half.folder, {"train.stop_at": None}, ())
    lock = Lock()
    lock.take(half.folder)
    with pytest.raises(ConfigError, match="is in use"):
        train(config, resume=run)
    lock.release()
    assert train(config, resume=run).finished
    assert json.loads((half.folder / HEARTBEAT).read_text())["state"] == "finished"
