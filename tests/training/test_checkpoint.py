"""Checkpoints are whole or absent, exact, and told apart from damaged ones."""

import errno
import json
import os

import pytest
import torch
from torch import nn

from sdlora.adapters import Lora, Target, find_layers, inject
from sdlora.atomic import replacing, write_text
from sdlora.errors import TrainingError
from sdlora.training.checkpoint import latest_checkpoint, restore_checkpoint, save_checkpoint


def learner(seed=0, rank=2):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    adapters = inject(model, find_layers(model, [Target()]), lambda path, layer: Lora(layer, rank))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    return model, {"denoiser": adapters}, optimizer


def learn(model, optimizer, steps):
    for step in range(steps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def values(adapters):
    return torch.cat([p.detach().flatten() for a in adapters["denoiser"].values() for p in (a.down, a.up)])


def test_a_restored_learner_goes_on_bit_for_bit(tmp_path):
    model, adapters, optimizer = learner()
    learn(model, optimizer, 3)
    save_checkpoint(tmp_path, 3, adapters, optimizer, {"note": "x"}, keep=2)
    learn(model, optimizer, 3)

    other_model, other_adapters, other_optimizer = learner()
    learn(other_model, other_optimizer, 1)  # anything else
    checkpoint, skipped = latest_checkpoint(tmp_path)
    restore_checkpoint(checkpoint, other_adapters, other_optimizer)
    learn(other_model, other_optimizer, 3)
    assert (checkpoint.step, checkpoint.facts["note"], skipped) == (3, "x", [])
    assert torch.equal(values(other_adapters), values(adapters))


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    _, adapters, optimizer = learner()
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, adapters, optimizer, {}, keep=3)
    damaged = tmp_path / "step-00000003" / "adapters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "step-00000002" / "state.json").unlink()
    checkpoint, skipped = latest_checkpoint(tmp_path)
    assert checkpoint.step == 1
    assert len(skipped) == 2
    assert "damaged" in skipped[0]


def test_old_ones_go(tmp_path):
    _, adapters, optimizer = learner()
    for step in range(5):
        save_checkpoint(tmp_path, step, adapters, optimizer, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_damaged_newer_one_never_pushes_out_a_good_one(tmp_path):
    _, adapters, optimizer = learner()
    for step in (3, 6):
        save_checkpoint(tmp_path, step, adapters, optimizer, {}, keep=2)
    (tmp_path / "step-00000006" / "adapters.safetensors").write_bytes(b"junk")
    save_checkpoint(tmp_path, 5, adapters, optimizer, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert latest_checkpoint(tmp_path)[0].step == 5


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_as_many_as_asked_for_remain(tmp_path, keep):
    _, adapters, optimizer = learner()
    for step in range(4):
        save_checkpoint(tmp_path, step, adapters, optimizer, {}, keep=keep)
    assert len(list(tmp_path.iterdir())) == min(keep, 4)


def test_without_a_whole_one_the_reason_is_given(tmp_path):
    with pytest.raises(TrainingError, match="before the first one was written"):
        latest_checkpoint(tmp_path)
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_text(json.dumps([1]))
    with pytest.raises(TrainingError, match="damaged checkpoint"):
        latest_checkpoint(tmp_path)


def test_another_rank_does_not_fit(tmp_path):
    _, adapters, optimizer = learner()
    save_checkpoint(tmp_path, 1, adapters, optimizer, {}, keep=1)
    _, other, other_optimizer = learner(rank=3)
    with pytest.raises(TrainingError, match=r"does not fit this run: 4 tensors"):
        restore_checkpoint(latest_checkpoint(tmp_path)[0], other, other_optimizer)


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    _, adapters, optimizer = learner()
    save_checkpoint(tmp_path, 1, adapters, optimizer, {}, keep=1)

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match="no space left"):
            save_checkpoint(tmp_path, 2, adapters, optimizer, {}, keep=1)
    assert latest_checkpoint(tmp_path)[0].step == 1


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(RuntimeError, match="halfway"), replacing(file) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("halfway")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write"):
        write_text(tmp_path / "file" / "below.txt", "x")
