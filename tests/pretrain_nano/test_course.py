"""A course can be left and taken up at any step, and its parts do what they say."""

import json
import random
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPTokenizer

from sdlora.adapters import find_layers
from sdlora.diffusion.schedule import Schedule
from sdlora.families.loading import NANO
from sdlora.families.sd1 import SD1
from tools.pretrain_nano import model, twin
from tools.pretrain_nano.batches import FILL, STAIN, Batch, batch, stains
from tools.pretrain_nano.captions import caption, prompt
from tools.pretrain_nano.concepts import Concept
from tools.pretrain_nano.course import Base, Course, Settings, loss_weight
from tools.pretrain_nano.crew import Crew
from tools.pretrain_nano.latents import Latents, even_fills, load_latents
from tools.pretrain_nano.model import save_base
from tools.pretrain_nano.sources import STYLES
from tools.pretrain_nano.tokenizer import TRIGGERS, train_tokenizer
from tools.pretrain_nano.train import STATE, TURN, take_tokenizer, take_up

NOTO = STYLES[0]
SCHEDULE = Schedule.from_config(json.loads((NANO / "scheduler/scheduler_config.json").read_text()))


def concept(n: int) -> Concept:
    return Concept(f"{n:04x}", f"thing {n}", ("tag", "other tag"), "objects", f"thing {n}", "learn")


@pytest.fixture
def data() -> Latents:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(10, 2, 4, 16, 16, generator=rng).half()
    fills = torch.rand(10, 2, 16, 16, generator=rng) < 0.2
    return Latents(values, fills, [concept(n) for n in range(10)], ["noto"] * 10)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([f"thing {n}, noto style" for n in range(10)], tmp_path_factory.mktemp("tokenizer"))


def test_a_batch_is_a_function_of_seed_and_step(data):
    first, again, other = (batch(data, 7, 4, seed, SCHEDULE) for seed in (0, 0, 1))
    assert torch.equal(first.latents, again.latents) and torch.equal(first.noise, again.noise)
    assert torch.equal(first.timesteps, again.timesteps) and first.captions == again.captions
    assert not torch.equal(first.noise, other.noise)


@pytest.mark.parametrize(("last", "times"), [("noto", 1), ("twemoji", 2), ("fluent-flat", 2)])
def test_a_round_shows_every_picture_once_and_of_the_hardest_styles_twice(data, last, times):
    data = replace(data, styles=["noto"] * 5 + [last] * 5)
    views = {view[0, 0, 0].item(): row for row, views in enumerate(data.values.float()) for view in views}
    size = 5 + 5 * times
    orders = []
    for turn in range(3):
        shown = batch(data, turn, size, 0, SCHEDULE)
        rows = [views[latent[0, 0, 0].item()] for latent in shown.latents]
        assert sorted(rows) == sorted([*range(5), *[*range(5, 10)] * times])
        orders.append(tuple(rows))
    assert len(set(orders)) == 3


def test_timesteps_are_spread_over_the_whole_schedule(data):
    timesteps = batch(data, 3, 10, 0, SCHEDULE).timesteps.sort().values
    assert ((timesteps >= torch.arange(0, 1000, 100)) & (timesteps < torch.arange(100, 1001, 100))).all()


def test_half_of_the_samples_are_stained_smoothly_and_never_more_than_noise_is():
    spread = torch.tensor([0.1, STAIN, 2.0]).repeat_interleave(400)
    found = stains(spread, torch.Size((1200, 4, 16, 16)), torch.Generator().manual_seed(0))
    assert torch.equal(found, stains(spread, found.shape, torch.Generator().manual_seed(0)))
    stained = found.flatten(1).abs().amax(1) > 0
    assert abs(stained.float().mean() - 0.5) < 0.05
    # The mean square over an even strength from 0 to the greatest is a third of its square.
    parts = zip(found.split(400), stained.split(400), strict=True)
    deviations = [part[there].square().mean().sqrt() for part, there in parts]
    greatest = torch.tensor([1.0, 1.0, STAIN / 2.0])
    assert torch.allclose(torch.stack(deviations), greatest / 3**0.5, rtol=0.15)
    steps = found[stained].diff(dim=3).square().mean().sqrt()
    assert steps < 0.5 * found[stained].square().mean().sqrt()  # of white noise 1.4


def test_what_undoes_a_stain_is_the_clean_picture(data):
    b = batch(data, 0, 10, 0, SCHEDULE)
    share = SCHEDULE.alphas_cumprod[b.timesteps][:, None, None, None]
    seen = SCHEDULE.add_noise(b.latents, b.noise, b.timesteps)
    assert torch.allclose((seen - (1 - share).sqrt() * b.noise) / share.sqrt(), b.latents, atol=1e-3)


def test_a_batch_is_stained_where_there_is_little_noise_and_knows_its_fills(data):
    means = [[] for _ in range(5)]  # by fifths of the schedule
    for step in range(60):
        b = batch(data, step, 10, 0, SCHEDULE)
        assert set(b.weights.unique().tolist()) == {1.0, FILL}
        for noise, t in zip(b.noise, b.timesteps.tolist(), strict=True):
            means[t // 200].append(F.avg_pool2d(noise, 8))
    little, *_, much = (torch.stack(part).std() for part in means)
    assert little > 1.5 / 8 and much < 1.1 / 8  # white noise: 1 / 8


def test_a_fill_is_even_and_not_white():
    picture = torch.ones(3, 128, 128)
    picture[:, 32:96, 32:96] = torch.tensor([0.8, 0.2, 0.1])[:, None, None]
    shaded = picture.clone()
    shaded[0, 32:96, 32:96] = torch.linspace(0, 1, 64)
    found = even_fills(torch.stack((picture, shaded, torch.ones(3, 128, 128))))
    inside = torch.zeros(16, 16, dtype=torch.bool)
    inside[5:11, 5:11] = True  # cells at its edge see white around them
    assert torch.equal(found[0], inside)
    assert not found[1:].any()


def test_an_error_in_a_fill_counts_more():
    base = Base(0)
    base.working = lambda seen, t, states, return_dict: (torch.zeros_like(seen),)
    noise = torch.ones(1, 4, 16, 16)
    ids, t = torch.zeros(1, 77, dtype=torch.long), torch.tensor([300])
    weights = torch.ones(1, 16, 16)
    plain = base.losses(Batch(noise, [""], noise, t, weights), ids)
    assert torch.allclose(plain, loss_weight(base.schedule.snr(t)))
    weights[:, :8] = FILL
    assert torch.allclose(base.losses(Batch(noise, [""], noise, t, weights), ids), plain * (1 + FILL) / 2)


def test_captions_leave_things_out_as_often_as_they_should():
    captions = [caption(concept(1), NOTO, random.Random(n)) for n in range(4000)]
    assert abs(captions.count("") / 4000 - 0.1) < 0.02
    said = [text for text in captions if text]
    assert all("thing 1" in text for text in said)
    assert abs(sum("noto style" not in text for text in said) / len(said) - 0.1) < 0.02
    assert abs(sum(any(word in TRIGGERS for word in text.split(", ")) for text in said) / len(said) - 0.03) < 0.01
    assert prompt(concept(1), NOTO) == "thing 1, noto style"


def test_loss_weight_is_min_snr_with_a_floor_measured_in_the_picture():
    snr = torch.tensor([0.004, 0.2, 1.0, 5.0, 50.0])
    assert torch.allclose(loss_weight(snr) * snr, torch.tensor([0.2, 0.2, 1.0, 5.0, 5.0]))


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    settings = Settings(samples=10000, size=10, warm_up_steps=100)
    assert settings.pace(0) == 0.01 and settings.pace(99) == settings.pace(799) == 1.0
    assert settings.pace(900) == 0.5 and settings.pace(1000) == 0.0


def test_a_course_that_was_left_equals_one_that_was_not(data, tokenizer, tmp_path):
    settings, cpu = Settings(samples=12, size=2, warm_up_steps=2), torch.device("cpu")
    whole = Course(settings, tmp_path, cpu)
    for _ in range(6):  # the last two steps lie behind the turn
        whole.advance(data, tokenizer)
    first = Course(settings, tmp_path, cpu)
    for _ in range(3):
        first.advance(data, tokenizer)
    first.save(STATE)
    second = Course(settings, tmp_path, cpu)
    take_up(second)
    assert second.step == 3
    for _ in range(3):
        second.advance(data, tokenizer)
    for name, value in whole.base.named_parameters():
        assert torch.equal(value, dict(second.base.named_parameters())[name]), name
        assert torch.equal(whole.average[name], second.average[name]), name


def test_the_text_encoder_rests_behind_the_turn(data, tokenizer, tmp_path):
    course = Course(Settings(samples=20, size=2), tmp_path, torch.device("cpu"))
    course.step = course.settings.turn
    before = [p.clone() for p in course.base.text.parameters()]
    course.advance(data, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(before, course.base.text.parameters(), strict=True))


def test_another_batch_size_goes_on_at_as_many_samples(data, tokenizer, tmp_path):
    first = Course(Settings(samples=24, size=2), tmp_path, torch.device("cpu"))
    first.step = 6
    first.save(STATE)
    second = Course(Settings(samples=24, size=3), tmp_path, torch.device("cpu"))
    take_up(second)
    assert second.step == 4


def test_a_course_begins_with_a_finished_base(tokenizer, tmp_path):
    first = Course(Settings(samples=24, size=2), tmp_path, torch.device("cpu"))
    first.average["denoiser.conv_in.bias"] = torch.full((48,), 0.25)
    average = first.averaged()
    save_base(tmp_path / "base", tokenizer, average.text, average.denoiser)
    second = Course(Settings(samples=24, size=3, seed=1), tmp_path, torch.device("cpu"))
    second.begin_with(tmp_path / "base", 12)
    assert second.step == 4
    weights = dict(second.base.named_parameters())
    for name, value in first.average.items():
        assert torch.equal(weights[name], value.half().float()), name
        assert torch.equal(second.average[name], weights[name]), name


def test_a_tokenizer_is_learned_once(tmp_path):
    words = SimpleNamespace(data=None, work=tmp_path / "work", start=NANO)
    first = take_tokenizer(words)
    assert first.get_vocab() == CLIPTokenizer.from_pretrained(NANO / "tokenizer").get_vocab()
    assert take_tokenizer(SimpleNamespace(data=None, work=words.work, start=None)).get_vocab() == first.get_vocab()


def test_more_samples_go_on_from_the_turn_and_not_from_the_end(tmp_path):
    cpu = torch.device("cpu")
    short = Course(Settings(samples=20, size=2), tmp_path, cpu)
    for step, name in ((short.settings.turn, TURN), (10, STATE)):
        short.step = step
        short.save(name)
    long, again = (
        Course(Settings(samples=200, size=2), tmp_path, cpu),
        Course(Settings(samples=20, size=2), tmp_path, cpu),
    )
    take_up(long)
    take_up(again)
    assert (long.step, again.step) == (8, 10)
    with pytest.raises(SystemExit, match="more --samples"):
        take_up(Course(Settings(samples=16, size=2), tmp_path, cpu))


def test_another_seed_is_refused(tmp_path):
    Course(Settings(samples=12, size=2), tmp_path, torch.device("cpu")).save(STATE)
    with pytest.raises(SystemExit, match="another --work"):
        take_up(Course(Settings(samples=12, size=2, seed=1), tmp_path, torch.device("cpu")))


def test_two_processes_compute_what_one_does(data, tokenizer, tmp_path):
    settings, cpu = Settings(samples=20, size=4, warm_up_steps=1), torch.device("cpu")
    alone, together = Course(settings, tmp_path, cpu), Course(settings, tmp_path, cpu)
    alone.base.compute_in_bf16(tmp_path)
    together.base.compute_in_bf16(tmp_path)
    together.crew = Crew(together.base, 2, settings.size, tmp_path)
    losses = [(alone.advance(data, tokenizer), together.advance(data, tokenizer)) for _ in range(2)]
    together.crew.dismiss()
    assert all(a == pytest.approx(b, rel=1e-2) for a, b in losses)
    moved = [torch.cat([p.detach().flatten() for p in c.base.parameters()]) for c in (alone, together)]
    assert F.cosine_similarity(*moved, dim=0) > 0.9999


def test_latents_are_kept_until_the_data_set_is_another(tmp_path):
    (tmp_path / "concepts.json").write_text(json.dumps([asdict(concept(1))]))
    (tmp_path / "manifest.json").write_text('{"sha256": "a"}')
    folder = tmp_path / "pictures" / "noto"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((128, 128, 3), 200, np.uint8)).save(folder / "0001.png")
    vae, cache = model.load_autoencoder(), tmp_path / "latents.safetensors"
    first = load_latents(tmp_path, vae, cache, views=2)
    assert first.values.shape == (1, 2, 4, 16, 16) and first.styles == ["noto"]
    exact = vae.encode(torch.full((1, 3, 128, 128), 200 / 127.5 - 1)).latents
    assert (first.values[0, 0] - exact).abs().max() < 0.1
    assert first.fills[0, 0].all() and not first.fills[0, 1].all()  # the second is smaller, on white
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(folder / "0001.png")
    again = load_latents(tmp_path, vae, cache, views=2)
    assert torch.equal(again.values, first.values) and torch.equal(again.fills, first.fills)
    (tmp_path / "manifest.json").write_text('{"sha256": "b"}')
    assert not torch.equal(load_latents(tmp_path, vae, cache, views=2).values, first.values)


def test_the_base_has_the_modules_of_stable_diffusion_1_5():
    denoiser = model.new_denoiser()
    assert len(find_layers(denoiser, SD1.targets["attention+ff"])) == 192
    shipped = json.loads((model.NANO / "unet" / "config.json").read_text())
    assert list(denoiser.config.block_out_channels) == shipped["block_out_channels"]


@pytest.mark.skipif(not twin.supported(), reason="needs AVX-512 BF16")
def test_the_twin_computes_the_masters_gradients(tmp_path):
    master = model.new_denoiser()
    fast = twin.Twin(master, tmp_path)
    x, t = torch.randn(4, 4, 16, 16), torch.tensor([10, 300, 600, 990])
    states, noise = torch.randn(4, 77, 128, requires_grad=True), torch.randn(4, 4, 16, 16)
    F.mse_loss(master(x, t, states, return_dict=False)[0], noise).backward()
    exact = [p.grad.clone() for p in master.parameters()]
    exact_states, states.grad = states.grad, None
    F.mse_loss(fast(x, t, states)[0].float(), noise).backward()
    fast.hand_over_gradients()
    whole = [torch.cat([g.flatten() for g in gs]) for gs in (exact, [p.grad for p in master.parameters()])]
    assert F.cosine_similarity(*whole, dim=0) > 0.999
    assert F.cosine_similarity(exact_states.flatten(), states.grad.flatten(), dim=0) > 0.999
    for a, p in zip(exact, master.parameters(), strict=True):
        assert F.cosine_similarity(a.flatten(), p.grad.flatten(), dim=0) > 0.98
