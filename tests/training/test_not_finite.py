"""Numbers that are infinite or not a number never reach the weights, wherever they come from."""

import json

import pytest
import torch
from notes import Notes

from sdlora.config_io import load_config
from sdlora.data.encoding import Encoder
from sdlora.errors import DatasetError, SdloraError, TrainingError
from sdlora.training import train as loop
from sdlora.training.checkpoint import latest_checkpoint
from sdlora.training.engine import Engine
from sdlora.training.session import Session
from sdlora.training.train import train


@pytest.fixture
def settings(tiny_base, style_dir, tmp_path):
    def make(name="run", **flags):
        base = {"base.model": str(tiny_base), "data.images": style_dir, "data.batch_size": 2, "lora.rank": 2}
        base |= {"train.steps": 12, "samples.sample_every": 0, "output.output": tmp_path / name}
        base |= {"output.save_every": 1, "output.save_dtype": "fp32"}
        return load_config(None, base | {key.replace("__", "."): value for key, value in flags.items()})

    return make


@pytest.fixture
def seen(monkeypatch):
    """All weights before and after each update, by step."""
    seen, update = {}, Engine.update

    def noted(self, loss):
        before = self.flat.values.clone()
        norm = update(self, loss)
        seen[len(seen) + 1] = before, self.flat.values.clone()
        return norm

    monkeypatch.setattr(Engine, "update", noted)
    return seen


def in_loss(engine, batch, loss):
    return loss * torch.nan


def in_gradient(engine, batch, loss):
    engine.flat.gradients[7] = torch.inf
    return loss


@pytest.mark.parametrize("plant", [in_loss, in_gradient])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_step_with_a_bad_number_changes_no_weight_and_names_the_pictures(
    settings, seen, monkeypatch, plant, micro_batch
):
    add = Engine.add

    def planted(self, batch, share):
        loss = add(self, batch, share)
        return plant(self, batch, loss) if batch.step == 4 else loss

    monkeypatch.setattr(Engine, "add", planted)
    notes = Notes()
    result = train(settings(train__micro_batch=micro_batch), reporter=notes)
    assert result.finished
    changed = [step for step, (before, after) in seen.items() if not torch.equal(before, after)]
    assert changed == [step for step in range(1, 13) if step != 5]
    (line,) = [line for line in notes.lines if "skipped" in line]
    assert line.startswith("step 5 skipped: its loss or gradient is not finite (pictures: ") and ".png" in line
    logged = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(logged) == 12 and (logged[4]["loss"] is None or logged[4]["gradient_norm"] is None)


def test_a_picture_whose_latents_are_not_finite_is_named_before_the_first_step(settings, monkeypatch):
    encode = Encoder._encode

    def planted(self, batch):
        mean, std = encode(self, batch)
        return mean.index_fill(0, torch.tensor([0]), torch.nan), std

    monkeypatch.setattr(Encoder, "_encode", planted)
    with pytest.raises(DatasetError, match=r"the latents of .*\.png are not finite"):
        train(settings(data__cache_dir=settings().output.output.parent / "cache"))


def test_a_latent_that_goes_bad_in_a_cache_is_one_picture_skipped_each_time(settings, seen, monkeypatch):
    microbatch = Session.microbatch

    def planted(self, step, piece):
        batch = microbatch(self, step, piece)
        for place, sample in enumerate(piece.samples):
            if sample.example == 0:
                batch.mean[place] = torch.nan
        return batch

    monkeypatch.setattr(Session, "microbatch", planted)
    notes = Notes()
    result = train(settings(data__batch_size=1), reporter=notes)
    name = next(line for line in notes.lines if "skipped" in line).partition("pictures: ")[2].strip(")")
    skipped = [line for line in notes.lines if "skipped" in line]
    assert result.finished and len(skipped) == 2 and all(name in line for line in skipped)
    assert bool(seen[12][1].isfinite().all())


def rates(result):
    return [json.loads(line)["learning_rate"] for line in (result.folder / "metrics.jsonl").read_text().splitlines()]


def test_after_three_bad_steps_the_run_goes_back_and_on_with_half_the_learning_rate(settings, monkeypatch):
    straight = train(settings("straight", optimizer__schedule="constant", optimizer__warmup=0))
    add, left = Engine.add, [3]

    def planted(self, batch, share):
        loss = add(self, batch, share)
        if batch.step >= 6 and left[0]:
            left[0] -= 1
            return loss * torch.nan
        return loss

    monkeypatch.setattr(Engine, "add", planted)
    notes = Notes()
    result = train(settings(optimizer__schedule="constant", optimizer__warmup=0), reporter=notes)
    (line,) = [line for line in notes.lines if "Going back to step" in line]
    back = int(line.partition("Going back to step ")[2].split()[0])
    assert result.finished and 0 < back <= 6
    full = rates(straight)[0]
    assert rates(result) == [full] * back + [full / 2] * (12 - back)
    assert latest_checkpoint(result.folder / "checkpoints")[0].facts["slowdown"] == 0.5


def test_when_that_does_not_help_the_run_ends_and_says_why(settings, monkeypatch):
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda self, b, share: add(self, b, share) * (1 if b.step < 6 else torch.nan))
    notes = Notes()
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, last in step 9 \(.*\.png"):
        train(settings(), reporter=notes)
    assert sum("Going back" in line for line in notes.lines) == 1
    checkpoint, skipped = latest_checkpoint(settings().output.output / "checkpoints")
    assert checkpoint.step <= 6 and not skipped


def test_values_that_are_not_finite_are_not_saved(settings, monkeypatch):
    gradients = loop.step_gradients

    def spoil(session, step, stop):
        if step == 3:
            with torch.no_grad():
                session.engine.flat.values[3] = torch.nan
        return gradients(session, step, stop)

    monkeypatch.setattr(loop, "step_gradients", spoil)
    with pytest.raises(SdloraError, match="not a number"):
        train(settings())
    for folder in (settings().output.output / "checkpoints").glob("step-*"):
        assert int(folder.name[5:]) <= 3
