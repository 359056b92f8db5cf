"""The length of a run, said before it starts."""

from types import SimpleNamespace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from sdlora.adapters import FlatParameters, Lora
from sdlora.config_io import load_config
from sdlora.training.lr import SCHEDULES, learning_rate_factor
from sdlora.training.meter import Meter
from sdlora.training.optimizers import make_optimizer, resolve_learning_rates
from sdlora.training.plan import make_plan
from sdlora.training.progress import duration


def plan(num=30, counts=(30,), **flags):
    return make_plan(load_config(None, {k.replace("__", "."): v for k, v in flags.items()}), num, counts)


def test_steps_are_derived_from_the_number_of_pictures():
    p = plan()
    assert (p.steps_per_epoch, p.total_steps, p.num_epochs) == (8, 800, 100)
    assert "30 pictures in batches of 4" in p.sentence()
    assert "each picture about 100 times" in p.sentence()


def test_large_sets_get_fewer_looks():
    p = plan(1000, (1000,))
    assert p.total_steps == 3000


def test_repeats_do_not_lengthen_a_derived_run():
    assert plan(30, (300,)).total_steps == pytest.approx(plan(30, (30,)).total_steps, rel=0.07)


def test_every_bucket_ends_with_a_short_batch():
    assert plan(9, (5, 4)).steps_per_epoch == 3
    assert plan(9, (5, 4), train__accumulation=2).steps_per_epoch == 2


def test_epochs_and_steps_are_obeyed():
    assert plan(train__epochs=3).total_steps == 24
    p = plan(train__steps=20)
    assert (p.total_steps, p.num_epochs) == (20, 3)


def test_samples_come_every_epoch_but_at_most_ten_times():
    assert plan(train__epochs=3).sample_every == 1
    p = plan(train__epochs=100)
    events = [s for s in range(p.total_steps) if p.samples_after(s)]
    assert len(events) == 10
    assert events[-1] == p.total_steps - 1
    assert plan(train__epochs=100, samples__sample_every=1).sample_every == 1
    silent = plan(train__epochs=100, samples__sample_every=0)
    assert not any(silent.samples_after(s) for s in range(silent.total_steps))
    assert silent.save_every == 10


def test_the_last_step_always_counts_as_an_event():
    p = plan(train__steps=21, samples__sample_every=2)
    assert [s + 1 for s in range(21) if p.saves_after(s)] == [16, 21]


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("cosine", get_cosine_schedule_with_warmup),
        ("linear", get_linear_schedule_with_warmup),
    ],
)
def test_after_the_warm_up_the_schedule_is_transformers(name, reference):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = reference(optimizer, 10, 100)
    for step in range(100):
        ours = learning_rate_factor(step, total_steps=100, warmup_steps=10, schedule=name)
        if step >= 10:
            assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_factor_is_positive_and_climbs_then_never_rises(name):
    factors = [learning_rate_factor(s, total_steps=50, warmup_steps=5, schedule=name) for s in range(50)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[:6] == sorted(factors[:6])
    assert factors[5] == 1
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_the_default_learning_rate_rises_as_the_denoiser_narrows(tiny_parts, nano_parts):
    config = load_config(None, {"lora.text_encoder": True})
    full = SimpleNamespace(
        denoiser=SimpleNamespace(config={"block_out_channels": (320, 640, 1280, 1280)}),
        family=tiny_parts.family,
        text_encoders={"text_encoder": None},
    )
    assert resolve_learning_rates(config, full) == {"denoiser": 1e-4, "text_encoder": 5e-5}
    assert resolve_learning_rates(config, nano_parts)["denoiser"] == pytest.approx(1e-4 * 1280 / 112)
    given = load_config(None, {"optimizer.learning_rate": 3e-4})
    assert resolve_learning_rates(given, nano_parts) == {"denoiser": 3e-4}


def test_optimizer_gets_every_setting():
    config = load_config(None, {"optimizer.beta1": 0.8, "optimizer.beta2": 0.95, "optimizer.weight_decay": 0.5})
    flat = FlatParameters({"a": [Lora(torch.nn.Linear(2, 2), 1)]}, torch.float32)
    optimizer = make_optimizer(flat, {"a": 0.1}, config.optimizer)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "base_lr", "betas", "weight_decay")}
    assert group == {"lr": 0.1, "base_lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.5}


def test_time_left_counts_the_samples_to_come(monkeypatch):
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter(plan(train__steps=20, samples__sample_every=1))
    meter.add(0.5, 4)
    meter.add(0.3, 4)
    assert meter.images_per_second == 4
    assert 0.3 < meter.mean_loss < 0.5
    note = meter.note(2, 1e-3, seconds_per_sampling=10)
    assert note.endswith("48 s left")  # 18 steps of 1 s, 3 rounds of samples of 10 s


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3723, "1:02:03 h")]
)
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
