from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from sdlora.adapters import Lora, inject
from sdlora.errors import ConfigError, SdloraError
from sdlora.training.device import DTYPES
from tools.bench import contest, measure
from tools.bench.apart import Apart
from tools.bench.bases import load_base
from tools.bench.check import Gradients, compare, objection
from tools.bench.contest import Contest, build_reference, exact_gradients, prepare
from tools.bench.inputs import make_factors, make_inputs
from tools.bench.ours import build_ours
from tools.bench.reference import Reference
from tools.bench.results import OURS, OUT_OF_MEMORY, REFERENCE, SideResult, complete
from tools.bench.rows import RANK


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST_TURN", 1e-3)


class Still:
    """A side that computes nothing, and always the same gradients."""

    notes = ()

    def __init__(self, up=(1.0, 0.0)):
        self.up = torch.tensor(up)

    def forward_backward(self, drawn, conditioning):
        return torch.ones(())

    def step(self, drawn, conditioning):
        return torch.ones(3).sum()

    def update(self):
        torch.ones(3).sum()

    def set_factors(self, factors):
        self.factors = factors

    def gradients(self):
        return {"layer": (torch.ones(2), self.up)}

    def frozen_weights(self):
        return {}


def still(row, parts):
    return Still()


def wrong(row, parts):
    return Still(up=(1.0, 1.0))


def crowded(times):
    """A side that runs out of memory for the first so many times that it is built."""
    left = iter([True] * times)

    def build(row, parts):
        if next(left, False):
            raise torch.OutOfMemoryError("no room")
        return Still()

    return build


@pytest.fixture
def quick(monkeypatch, nano_parts):
    """Neither loads a base nor computes in fp32."""
    monkeypatch.setattr(contest, "load_base", lambda row, device: nano_parts)
    monkeypatch.setattr(contest, "exact_gradients", lambda row, device, weights: Gradients(1.0, Still().gradients()))


def test_equal_sides_are_found_equal(row, device, twins):
    found = Contest(row, device, twins).run(rounds=3, limit=0)
    ours, reference = found.sides[OURS], found.sides[REFERENCE]
    assert found.checked and not found.objection and found.together
    assert ours.operations == reference.operations
    assert ours.worst_cosine == reference.worst_cosine == pytest.approx(1)
    assert found.ratio.low <= found.ratio.median <= found.ratio.high
    assert found.rounds == 3
    assert ours.peak_bytes is None  # of one process with both sides it would say nothing
    plain = complete(asdict(found), flop=10, rate=2.0)
    assert plain["operations_ratio"] == 1
    assert plain["sides"][OURS]["share_of_peak"] == pytest.approx(5 / ours.seconds.median)


def test_sides_in_processes_of_their_own_find_the_same(row, device):
    """All numbers that do not depend on the clock, and the memory of each."""
    row = replace(row, side=128)  # below that one token attends to itself, and its gradients are rounding alone
    together = Contest(row, device).run(rounds=3, limit=0)
    contest = Contest(row, device, apart=1)
    apart = contest.run(rounds=3, limit=0)
    processes = [side._process for side in contest.ready.values()]
    contest.release()
    assert [process.returncode for process in processes] == [0, 0]
    for name in (OURS, REFERENCE):
        found, expected = apart.sides[name], together.sides[name]
        assert found.operations == expected.operations and found.notes == expected.notes
        assert found.worst_cosine == pytest.approx(expected.worst_cosine, abs=1e-6)
        assert found.peak_bytes > 0 and found.seconds is not None
    assert apart.checked and apart.ratio is not None


def test_a_side_that_fails_is_told(row, device):
    with pytest.raises(SdloraError, match="the process of sdlora ended with code 1"):
        Apart(OURS, replace(row, base_dtype="int3"), SideResult(), threads=1)


def test_a_killed_side_is_told(row, device):
    side = Apart(REFERENCE, row, SideResult(), threads=1)
    side._process.kill()
    with pytest.raises(SdloraError, match="the process of reference was killed by the system, probably for memory"):
        side.step()
    side.end()


def test_wrong_gradients_are_not_timed(row, device, quick):
    found = Contest(row, device, {OURS: wrong, REFERENCE: still}).run(rounds=3, limit=0)
    assert found.objection == "the gradient of layer.up has cosine 0.70711 with that of the fp32 run"
    assert found.sides[OURS].seconds is None and found.ratio is None


def test_a_reference_that_does_not_fit_is_one_cell(row, device, quick):
    found = Contest(row, device, {OURS: still, REFERENCE: crowded(9)}).run(rounds=3, limit=0)
    assert found.sides[REFERENCE].problem == OUT_OF_MEMORY
    assert found.sides[OURS].seconds is not None and found.ratio is None
    assert found.checked


def test_sides_that_do_not_fit_at_once_are_timed_one_after_the_other(row, device, quick):
    class OneAtATime(Contest):
        def _fit(self, make):
            if self.ready:
                self.release()
            return make()

    found = OneAtATime(row, device, {OURS: still, REFERENCE: still}).run(rounds=3, limit=0)
    assert not found.together
    assert found.ratio is not None and found.rounds == 3


def test_a_side_that_only_fits_alone_is_built_alone(row, device, quick):
    found = Contest(row, device, {OURS: still, REFERENCE: crowded(1)}).run(rounds=3, limit=0)
    assert not found.sides[REFERENCE].problem and found.ratio is not None


def test_a_setting_that_a_machine_cannot_do_is_one_cell(row, device, quick):
    def build(row, parts):
        raise ConfigError("fp8 needs another GPU")

    found = Contest(row, device, {OURS: build, REFERENCE: still}).run(rounds=3, limit=0)
    assert found.sides[OURS].problem == "fp8 needs another GPU"
    assert found.sides[REFERENCE].seconds is not None and not found.checked


def test_the_exact_run_takes_the_weights_that_it_is_given(row, device):
    parts = load_base(row, device)
    path = next(iter(make_factors(parts, parts.denoiser)))
    weight = parts.denoiser.get_submodule(path).weight
    plain, same = (exact_gradients(row, device, weights) for weights in ({}, {path: weight}))
    other = exact_gradients(row, device, {path: weight * 0.5})
    assert plain.loss == same.loss != other.loss


def test_batches_and_factors_are_functions_of_the_row(row, device):
    first, second = (load_base(row, device) for _ in range(2))
    a, b = (make_inputs(row, parts, 2) for parts in (first, second))
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one.drawn.noise, other.drawn.noise)
        assert torch.equal(one.conditioning["states"], other.conditioning["states"])
    assert not torch.equal(a[0].drawn.noise, a[1].drawn.noise)
    assert torch.equal(a[0].drawn.noise, a[0].drawn.noise.bfloat16().float())
    one, other = (make_factors(parts, parts.denoiser) for parts in (first, second))
    assert all(torch.equal(one[path][0], other[path][0]) for path in one)


def test_the_reference_computes_what_the_definition_says(row, device):
    """Its gradients are those of W + B A trained on the mean squared error of the noise, without peft."""
    parts = load_base(row, device)
    inputs, factors = make_inputs(row, parts, 1)[0], make_factors(parts, parts.denoiser)
    side = Reference(load_base(row, device).denoiser, parts.scheduler_config)
    side.set_factors(factors)
    loss = side.forward_backward(inputs.drawn, inputs.conditioning)
    layers = {path: parts.denoiser.get_submodule(path) for path in factors}
    adapters = inject(parts.denoiser, layers, lambda path, layer: Lora(layer, RANK))
    for path, (down, up) in factors.items():
        adapters[path].down.data, adapters[path].up.data = down, up
    drawn = inputs.drawn
    noisy = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").add_noise(
        drawn.latents, drawn.noise, drawn.t
    )
    expected = F.mse_loss(parts.family.denoise(parts, noisy, drawn.t, inputs.conditioning), drawn.noise)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for path, (down, up) in side.gradients().items():
        torch.testing.assert_close(down, adapters[path].down.grad, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(up, adapters[path].up.grad, rtol=1e-3, atol=1e-7)


def test_a_step_of_the_reference_is_adamw_after_clipping(row, device):
    parts = load_base(row, device)
    inputs, factors = make_inputs(row, parts, 1)[0], make_factors(parts, parts.denoiser)
    side = Reference(parts.denoiser, parts.scheduler_config)
    side.set_factors(factors)
    before = [p.detach().clone() for p in side.parameters]
    side.step(inputs.drawn, inputs.conditioning)
    moved = [(p.detach() - old).abs().max() for p, old in zip(side.parameters, before, strict=True)]
    assert all(p.grad is None for p in side.parameters)
    assert torch.stack(moved).max() == pytest.approx(1e-4, rel=0.1)  # Adam's first step is the learning rate


def test_checkpointing_changes_the_work_and_not_the_result(row, device):
    row = replace(row, precision="bf16")
    losses = []
    for checkpointing in (False, True):
        found = SideResult()
        contender = prepare(build_reference, replace(row, checkpointing=checkpointing), device, found)
        losses.append(contender.gradients.loss)
        assert contender.inputs[0].conditioning["states"].dtype == DTYPES[row.precision]
        assert found.building_bytes > 0 and found.peak_bytes > 0
    assert losses[0] == losses[1]


def test_gradients_stay_what_they_were_when_the_side_goes_on(row, device):
    contender = prepare(build_ours, row, device, SideResult())
    before = {path: (down.clone(), up.clone()) for path, (down, up) in contender.gradients.factors.items()}
    contender.step()
    for path, pair in contender.gradients.factors.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[path], strict=True))


def test_sdlora_computes_the_gradients_of_the_reference(row, device):
    row = replace(row, side=128)  # below that one token attends to itself, and its gradients are rounding alone
    ours, reference = (prepare(build, row, device, SideResult()).gradients for build in (build_ours, build_reference))
    assert ours.loss == pytest.approx(reference.loss, rel=1e-5)
    assert compare(ours, reference).worst[1] > 0.99999
    assert compare(ours, reference).worst_length[1] < 1e-3


def test_both_sides_make_the_same_steps(row, device):
    """Three updates on the same batches: clipping and AdamW are the same arithmetic."""
    losses = []
    for build in (build_ours, build_reference):
        contender = prepare(build, row, device, SideResult())  # two steps
        batch = contender.inputs[2]
        losses.append(float(contender.side.forward_backward(batch.drawn, batch.conditioning)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_weights_of_fewer_bits_are_checked_against_a_run_over_their_values(row, device):
    row = replace(row, side=128, base_dtype="nf4")
    contender = prepare(build_ours, row, device, SideResult())
    weights = contender.side.frozen_weights()
    assert len(weights) > 100
    restored, plain = (compare(contender.gradients, exact_gradients(row, device, w)) for w in (weights, {}))
    assert restored.worst[1] > 0.99999
    assert plain.worst[1] < 0.999


def test_sdlora_passes_its_own_check_in_bf16(row, device):
    row = replace(row, side=128, precision="bf16")
    ours, reference = (prepare(build, row, device, SideResult()).gradients for build in (build_ours, build_reference))
    truth = exact_gradients(row, device, {})
    assert objection(compare(ours, truth), compare(reference, truth)) == ""
