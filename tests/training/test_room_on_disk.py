"""A disk that is full in the midst of a run: old checkpoints go, the run waits, and what was learned is kept."""

import errno

import pytest
import torch
from notes import Notes
from safetensors.torch import load_file

from sdlora import faults
from sdlora.config_io import load_config
from sdlora.errors import DiskFullError
from sdlora.training import room_on_disk
from sdlora.training.folder import RunFolder, reopen
from sdlora.training.room_on_disk import RESERVE, give_up_reserve, reserve, with_room
from sdlora.training.train import train


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(room_on_disk, "POLL", 0.0)
    yield
    faults.arm("")


def full_so_often(times):
    left = [times]

    def write():
        if left[0]:
            left[0] -= 1
            raise DiskFullError("full")
        return "written"

    return write


def test_a_write_is_tried_again_until_there_is_room(tmp_path):
    notes = Notes()
    assert with_room(full_so_often(5), RunFolder(tmp_path, "x"), notes, lambda: False) == "written"
    assert "Waiting for room" in notes.lines[0] and "going on" in notes.lines[-1]


def test_who_does_not_want_to_wait_stops(tmp_path):
    with pytest.raises(DiskFullError, match="full"):
        with_room(full_so_often(5), RunFolder(tmp_path, "x"), Notes(), lambda: True)


def test_nobody_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(room_on_disk, "PATIENCE", 0.05)
    monkeypatch.setattr(room_on_disk, "POLL", 0.01)
    with pytest.raises(DiskFullError, match="full"):
        with_room(full_so_often(10**9), RunFolder(tmp_path, "x"), Notes(), lambda: False)


def test_bytes_are_kept_for_the_end(tmp_path):
    reserve(tmp_path, 100_000)
    assert (tmp_path / RESERVE).stat().st_size == 100_000
    assert give_up_reserve(tmp_path) and not give_up_reserve(tmp_path)


@pytest.fixture
def settings(tiny_base, style_dir, tmp_path):
    def make(name):
        flags = {"base.model": str(tiny_base), "data.images": style_dir, "lora.rank": 2, "train.epochs": 4}
        flags |= {"output.save_every": 1, "samples.sample_every": 0, "output.keep_checkpoints": 3}
        return load_config(None, flags | {"output.output": tmp_path / name, "output.name": "x", "data.batch_size": 2})

    return make


PLACES = [
    "metrics written@5",
    "adapters.safetensors written@2",
    "state.json flushed@3",
    "checkpoint written@2",
    "x-N.safetensors begun@2",
    "x.safetensors written@1",
    "x.json begun@1",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_run_on_a_disk_that_is_full_for_a_while_ends_as_any_other(settings, place):
    straight = train(settings("straight"))
    faults.arm(f"{place}=enospc*4")
    notes = Notes()
    result = train(settings("full"), reporter=notes)
    assert any("no space left" in line for line in notes.lines)
    a, b = load_file(straight.lora), load_file(result.lora)
    assert all(torch.equal(a[key], b[key]) for key in a | b)
    assert len((result.folder / "metrics.jsonl").read_text().splitlines()) == result.total_steps
    assert not [path for path in result.folder.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize("place", ["adapters.safetensors flushed@2", "metrics written@6", "checkpoint in place@2"])
def test_after_an_error_of_the_disk_a_run_is_resumed_and_ends_as_any_other(settings, place):
    straight = train(settings("straight"))
    faults.arm(f"{place}=eio")
    with pytest.raises(Exception, match="Input/output error"):
        train(settings("broken"))
    faults.arm("")
    run, config = reopen(settings("broken").output.output, {}, ())
    result = train(config, resume=run)
    a, b = load_file(straight.lora), load_file(result.lora)
    assert all(torch.equal(a[key], b[key]) for key in a | b)


def test_a_half_written_line_of_the_log_is_taken_back(tmp_path):
    run = RunFolder(tmp_path, "x")
    run.log({"step": 1, "loss": 0.5})
    faults.arm("metrics written@1=enospc")
    with pytest.raises(DiskFullError, match="no space left"):
        run.log({"step": 2, "loss": 0.5})
    faults.arm("")
    run.log({"step": 2, "loss": 0.25})
    assert run.losses() == [0.5, 0.25]


def test_other_troubles_are_no_full_disk(tmp_path):
    from sdlora.atomic import explained

    assert isinstance(explained(tmp_path, OSError(errno.EDQUOT, "quota")), DiskFullError)
    assert not isinstance(explained(tmp_path, OSError(errno.EACCES, "no")), DiskFullError)
