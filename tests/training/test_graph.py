"""Recorded steps. A recorder stands in whose graphs call Python again, so all but CUDA itself is what a GPU runs."""

import dataclasses

import pytest
import torch
from torch import nn

from sdlora.adapters import FlatParameters, Lora, find_layers, inject
from sdlora.config_io import load_config
from sdlora.diffusion.counter import Philox
from sdlora.diffusion.noise import generator
from sdlora.diffusion.schedule import Schedule
from sdlora.errors import ConfigError, TrainingError
from sdlora.families import Base, Parts, load_parts
from sdlora.families.sd1 import SD1
from sdlora.training.adamw8bit import AdamW8bit
from sdlora.training.engine import Engine
from sdlora.training.graph import GraphedSteps, choose_graphs
from sdlora.training.optimizers import make_optimizer
from sdlora.training.step import Microbatch, draw_counted

RATE = 2.0**-10  # which fp32 holds exactly


class Replay:
    def __init__(self, compute, log):
        self.compute, self.log = compute, log

    def replay(self):
        self.log.append("replay")
        self.compute()

    def reset(self):
        self.log.append("reset")


class Pretended:
    """Records nothing: replays run the computation. What may go wrong on a GPU is put in by the tests."""

    def __init__(self, free=1 << 40, needs=1 << 20, error=None, spoil=None):
        self.free, self.needs, self.error, self.spoil, self.log = free, needs, error, spoil, []

    def record(self, compute):
        self.log.append("record")
        compute()
        if self.error:
            raise self.error
        return Replay(self.spoil(compute) if self.spoil else compute, self.log)

    def room(self):
        return self.free

    def peak(self, compute):
        return compute(), self.needs


def flags(**changes):
    return load_config(None, {"data.images": "pictures", "optimizer.schedule": "constant"} | changes)


def toy(parts, noisy, t, conditioning):
    """Denoises with two convolutions and the mean of the text."""
    signal = parts.denoiser[0](noisy) * (1 + t.to(noisy) / 1000)[:, None, None, None]
    text = conditioning["states"].to(noisy).mean((1, 2))[:, None, None, None]
    return parts.denoiser[1](signal.tanh() + text)


@pytest.fixture
def make_engine():
    """Builds an engine over two convolutions that draws from counters, as on CUDA."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        denoiser = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1))
        return build(
            Parts(
                family=dataclasses.replace(SD1, denoise=toy),
                name="toy",
                denoiser=denoiser,
                vae=nn.Identity(),
                text_encoders={},
                tokenizers={},
                schedule=Schedule.from_config(SD1.scheduler_config),
                scheduler_config={},
                resolution=64,
            ),
            {"0": denoiser[0], "1": denoiser[1]},
            dtype,
        )

    return make


def build(parts, layers, dtype=torch.float32):
    parts.denoiser.to(dtype)
    parts.denoiser.requires_grad_(False)
    adapters = inject(parts.denoiser, layers, lambda path, layer: Lora(layer, 2, None, 0.0, generator("t", path)))
    for path, adapter in adapters.items():
        adapter.up.data.copy_(torch.randn(adapter.up.shape, generator=generator("up", path)) * 0.05)
    flat = FlatParameters({"denoiser": adapters.values()}, dtype)
    settings = flags()
    engine = Engine(parts, flat, make_optimizer(flat, {"denoiser": RATE}, settings.optimizer), settings.train)
    engine.source = Philox.of(settings.train.seed, "sample", "cpu")
    parts.denoiser.train()
    return engine


def batch(step, size=2, side=8, first=0, tokens=77):
    rng = generator("batch", step, size, side, first)
    mean, std = torch.randn(size, 4, side, side, generator=rng), torch.rand(size, 4, side, side, generator=rng)
    return Microbatch(
        mean, std, {"states": torch.randn(size, tokens, 16, generator=rng)}, step, range(first, first + size)
    )


def run(engine, steps=6, batches=lambda step: [batch(step)]):
    """Returns losses, norms and final values."""
    numbers = []
    for step in range(steps):
        several = batches(step)
        engine.begin()
        loss = torch.zeros(())
        for each in several:
            loss += engine.add(each, 1 / sum(len(b.positions) for b in several))
        numbers.append((float(loss), float(engine.update(loss))))
    return numbers, engine.flat.values.clone()


def graphed(engine, recorder, **more):
    said = []
    engine.graphs = GraphedSteps(engine, recorder, said.append, **more)
    return said


def same(a, b):
    return a[0] == b[0] and torch.equal(a[1], b[1])


VARIED = {
    "one batch": lambda step: [batch(step)],
    "accumulated": lambda step: [batch(step), batch(step, 1, first=2)],
    "two sizes": lambda step: [batch(step, side=8 if step % 2 else 16)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batches", VARIED.values(), ids=VARIED)
def test_steps_through_buffers_equal_plain_steps_bit_for_bit(make_engine, batches, dtype):
    plain, through = make_engine(dtype), make_engine(dtype)
    recorder = Pretended()
    said = graphed(through, recorder)
    assert same(run(plain, 8, batches), run(through, 8, batches))
    assert recorder.log.count("replay") > 8 and not said
    assert through.graphs.abandoned is None
    assert all(isinstance(group["lr"], float) for group in through.optimizer.param_groups)  # as checkpoints want it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_leaves_gradients_that_batches_add_to(make_engine, dtype):
    engine = make_engine(dtype)
    gradients = []
    for several in ([batch(0)], [batch(1)], [batch(0), batch(1)]):
        engine.begin()
        for each in several:
            engine.add(each, 0.5)
        gradients.append(engine.flat.gradients.clone())
    assert all(float(gradient.norm()) > 0 for gradient in gradients)
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


def test_steps_of_a_unet_through_buffers_equal_plain_steps_bit_for_bit(tiny_base):
    def unet():
        parts = load_parts(Base(str(tiny_base), tiny_base, "test"))
        return build(parts, find_layers(parts.denoiser, parts.family.targets["attention"]))

    plain, through = unet(), unet()
    graphed(through, Pretended())
    assert same(run(plain, 3), run(through, 3))
    assert through.graphs.kinds == 1


def test_each_kind_of_batch_is_recorded_once_and_the_update_once(make_engine):
    engine = make_engine()
    recorder = Pretended()
    graphed(engine, recorder)
    run(engine, 8, VARIED["two sizes"])
    assert recorder.log.count("record") == 3
    assert engine.graphs.kinds == 2


def test_a_kind_that_comes_only_once_is_not_recorded(make_engine):
    engine = make_engine()
    recorder = Pretended()
    graphed(engine, recorder)
    run(engine, 3, lambda step: [batch(step, tokens=77 * (step + 1))])
    assert engine.graphs.kinds == 0


def test_the_learning_rate_may_change_after_recording(make_engine):
    def train(engine):
        values = []
        for step in range(6):
            for group in engine.optimizer.param_groups:
                group["lr"] = RATE / (1 << step)
            values.append(run(engine, 1, lambda _, step=step: [batch(step)])[1])
        return values

    plain, through = make_engine(), make_engine()
    graphed(through, Pretended())
    assert all(torch.equal(a, b) for a, b in zip(train(plain), train(through), strict=True))


def test_given_draws_go_through_graphs_as_well(make_engine):
    def train(engine):
        numbers = []
        for step in range(5):
            source = batch(step)
            drawn = draw_counted(
                source.mean, source.std, source.places, engine.source, num_timesteps=1000, noise_offset=0.0
            )
            engine.begin()
            loss = engine.forward_backward(drawn, source.conditioning, 0.5)
            numbers.append((float(loss), float(engine.update(loss))))
        return numbers, engine.flat.values.clone()

    plain, through = make_engine(), make_engine()
    graphed(through, Pretended())
    numbers = train(plain)
    assert same(numbers, train(through)) and through.graphs.kinds == 1
    assert same(numbers, run(make_engine(), 5))  # drawing inside and outside give the same


def test_what_cannot_be_recorded_trains_on_without_and_says_why_once(make_engine):
    plain, through = make_engine(), make_engine()
    said = graphed(through, Pretended(error=RuntimeError("operation not permitted when stream is capturing\nmore")))
    assert same(run(plain, 8), run(through, 8))
    assert said == ["No CUDA graphs, so steps take longer: operation not permitted when stream is capturing"]


def test_the_reason_is_what_went_wrong_first(make_engine):
    class Spoiled(Pretended):
        def record(self, compute):
            try:
                raise RuntimeError("a product waited for the CPU")
            finally:
                raise RuntimeError("the recording failed due to a previous error")

    engine = make_engine()
    said = graphed(engine, Spoiled())
    run(engine, 3)
    assert said == ["No CUDA graphs, so steps take longer: a product waited for the CPU"]


def test_a_replay_that_computes_something_else_is_not_trusted(make_engine):
    plain, through = make_engine(), make_engine()

    def spoil(compute):
        def wrong():
            compute()
            through.flat.gradients.mul_(1.01)

        return wrong

    recorder = Pretended(spoil=spoil)
    said = graphed(through, recorder)
    assert same(run(plain, 8), run(through, 8))
    assert len(said) == 1 and "1.0e-02 away" in said[0] and "1.0e-03 is allowed" in said[0]
    assert recorder.log[-1] == "reset"


def test_where_steps_themselves_differ_a_replay_may_too(make_engine):
    engine = make_engine()
    exact, calls = engine.compute, []

    def unsteady(inputs):
        loss = exact(inputs)
        calls.append(None)
        engine.flat.gradients.mul_(1 + 1e-3 * (len(calls) % 2))
        return loss

    engine.compute = unsteady
    said = graphed(engine, Pretended())
    run(engine, 6)
    assert not said and engine.graphs.kinds == 1


def test_memory_that_does_not_suffice_excludes_a_batch_but_not_others(make_engine):
    plain, through = make_engine(), make_engine()
    recorder = Pretended(free=1 << 30)
    needs = iter((1 << 30, 1 << 20))
    recorder.peak = lambda compute: (compute(), next(needs))
    said = graphed(through, recorder)
    assert same(run(plain, 8, VARIED["two sizes"]), run(through, 8, VARIED["two sizes"]))
    assert through.graphs.kinds == 1
    assert len(said) == 1 and said[0].startswith("Some batches are computed without a CUDA graph: that takes 1.1 GB")


def test_graphs_share_their_memory(make_engine):
    engine = make_engine()
    graphed(engine, Pretended(free=25 << 20, needs=10 << 20))  # two graphs of their own would not fit
    run(engine, 8, VARIED["two sizes"])
    assert engine.graphs.kinds == 2


def test_the_graph_unused_for_longest_makes_room_and_is_not_made_again(make_engine):
    sides = [8, 8, 16, 16, 8, 24, 24, 16, 8, 16]
    plain, through = make_engine(), make_engine()
    recorder = Pretended()
    said = graphed(through, recorder, limit=2)
    by_turns = lambda step: [batch(step, 1, sides[step])]  # noqa: E731
    assert same(run(plain, 10, by_turns), run(through, 10, by_turns))
    assert recorder.log.count("record") == 4 and recorder.log.count("reset") == 1
    assert through.graphs.kinds == 2 and len(said) == 1 and "2 kinds" in said[0]


def test_numbers_that_are_not_finite_neither_prove_nor_disprove_a_graph(make_engine):
    def batches(step):
        normal = batch(step)
        return [dataclasses.replace(normal, mean=normal.mean * (float("inf") if step in (1, 2) else 1))]

    plain, through = make_engine(), make_engine()
    said = graphed(through, Pretended())
    ours, theirs = run(plain, 6, batches), run(through, 6, batches)
    assert torch.equal(ours[1], theirs[1]) and bool(ours[1].isfinite().all())
    assert not said and through.graphs.kinds == 1


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(make_engine, graphs):
    engine = make_engine()
    if graphs:
        graphed(engine, Pretended())
    _, before = run(engine, 4)
    normal = batch(4)
    run(engine, 1, lambda _: [dataclasses.replace(normal, mean=normal.mean * float("inf"))])
    assert torch.equal(engine.flat.values, before)
    steps = {float(state["step"]) for state in engine.optimizer.state.values()}
    assert steps == {4.0}


def test_a_loss_scale_falls_in_a_replay_as_in_a_plain_step(make_engine):
    def scaled():
        engine = make_engine()
        engine.scale = torch.full((), 2.0**16)
        return engine

    def batches(step):
        normal = batch(step)
        return [dataclasses.replace(normal, mean=normal.mean * (float("inf") if step == 5 else 1))]

    plain, through = scaled(), scaled()
    graphed(through, Pretended())
    a, b = run(plain, 8, batches), run(through, 8, batches)
    assert torch.equal(a[1], b[1])
    assert plain.state() == through.state() == {"scale": 2.0**15, "calm": 2.0}


def test_weights_that_were_moved_make_graphs_anew(make_engine):
    engine = make_engine()
    recorder = Pretended()
    graphed(engine, recorder)
    run(engine, 4)
    assert recorder.log.count("record") == 2
    weight = engine.parts.denoiser[0].layer.weight
    weight.data = weight.data.clone()
    run(engine, 2)
    assert recorder.log.count("record") == 4 and recorder.log.count("reset") == 2


@pytest.mark.parametrize("capturable", [False, True])
def test_an_optimizer_that_is_not_known_to_be_recordable_steps_beside_the_graph(make_engine, capturable):
    class Own(AdamW8bit):
        pass

    Own.capturable = capturable
    plain, through = make_engine(), make_engine()
    for engine in (plain, through):
        engine.optimizer = Own([{"params": list(engine.flat.parts.values())}], lr=RATE)
    recorder = Pretended()
    graphed(through, recorder)
    ours, theirs = run(plain), run(through)
    # Its update multiplies with the rate and the decay in another precision when the rate is a tensor.
    torch.testing.assert_close(
        ours[1], theirs[1], rtol=0 if not capturable else 1e-6, atol=0 if not capturable else 1e-8
    )
    assert recorder.log.count("record") == 1 + capturable


def test_what_was_asked_for_and_fails_stops_the_run(make_engine):
    engine = make_engine()
    graphed(engine, Pretended(error=RuntimeError("no")), required=True)
    with pytest.raises(TrainingError, match=r"cuda_graph is on, and recording failed: no; use auto"):
        run(engine, 3)
    engine = make_engine()
    graphed(engine, Pretended(free=0), required=True)
    with pytest.raises(TrainingError, match=r"not all batches can have a graph: that takes"):
        run(engine, 3)


@pytest.mark.parametrize(
    ("changes", "device", "chosen", "why"),
    [
        ({}, "cuda", True, "started together"),
        ({}, "cpu", False, "for CUDA, and this is cpu"),
        ({}, "mps", False, "for CUDA, and this is mps"),
        ({"train.cuda_graph": "off"}, "cuda", False, "as asked for"),
        ({"train.cuda_graph": "on"}, "cuda", True, "as asked for"),
        ({"lora.dropout": 0.1}, "cuda", False, "dropout"),
        ({"lora.text_encoder": True}, "cuda", False, "text encoders that train"),
    ],
)
def test_graphs_are_chosen_where_they_can_be(changes, device, chosen, why):
    got = choose_graphs(flags(**changes), torch.device(device))
    assert got[0] == chosen and why in got[1]


def test_graphs_that_are_asked_for_and_cannot_be_are_refused():
    config = flags(**{"train.cuda_graph": "on", "lora.dropout": 0.1})
    with pytest.raises(ConfigError, match=r"dropout.*the base is offloaded; use auto"):
        choose_graphs(config, torch.device("cuda"), ["the base is offloaded"])


def test_counted_draws_depend_on_the_place_alone(make_engine):
    engine = make_engine()
    one = batch(3, 4)
    options = {"num_timesteps": 1000, "noise_offset": 0.1}
    whole = draw_counted(one.mean, one.std, one.places, engine.source, **options)
    for i in range(4):
        part = draw_counted(one.mean[i : i + 1], one.std[i : i + 1], one.places[i : i + 1], engine.source, **options)
        assert torch.equal(part.noise[0], whole.noise[i])
        assert torch.equal(part.latents[0], whole.latents[i])
        assert int(part.t) == int(whole.t[i])
    assert whole.noise.std() > 0.9 and whole.t.dtype == torch.int64
    without = draw_counted(one.mean, None, one.places, engine.source, num_timesteps=1000, noise_offset=0.0)
    assert torch.equal(without.latents, one.mean) and torch.equal(without.t, whole.t)
    shift = (whole.noise - without.noise).flatten(2)
    assert float(shift.std(2).max()) < 1e-6 and float(shift.mean(2).abs().max()) > 0
