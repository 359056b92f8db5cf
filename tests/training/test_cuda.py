"""Switches and choices for CUDA, as far as a machine without it can show."""

import pytest
import torch
from torch import nn

from sdlora.attention.choose import CPU_KERNELS, candidates
from sdlora.config_io import load_config
from sdlora.diffusion.counter import Philox
from sdlora.training import cuda
from sdlora.training.progress import Reporter
from sdlora.training.setup import _choose_layout, set_up


@pytest.mark.parametrize(
    ("device", "dtype", "first", "count"),
    [("cpu", torch.bfloat16, "sdpa", 3), ("cuda", torch.bfloat16, "sdpa", 4), ("cuda", torch.float16, "sdpa", 4)],
)
def test_the_standard_comes_first_among_the_kernels(monkeypatch, device, dtype, first, count):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = candidates(torch.device(device), dtype)
    assert next(iter(found)) == first and len(found) == count
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert ("xformers" in candidates(torch.device(device), dtype)) == (device == "cuda")


def test_fp32_and_other_devices_have_no_choice():
    assert candidates(torch.device("cpu"), torch.float32) is None
    assert candidates(torch.device("cuda"), torch.float32) is None
    assert candidates(torch.device("mps"), torch.bfloat16) is None
    assert candidates(torch.device("cpu"), torch.bfloat16) == CPU_KERNELS


def test_without_cuda_no_switch_is_touched():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    cuda.prepare_cuda()
    assert before == (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision())


class Pretended:
    """Records nothing, or fails to."""

    def __init__(self, fails=False):
        self.fails, self.resets = fails, 0

    def record(self, compute):
        if self.fails:
            raise RuntimeError("no")
        self.replay = compute
        return self

    def reset(self):
        self.resets += 1


@pytest.fixture
def engine():
    """Stands in for an engine over one convolution with a factor beside it."""

    class Stand:
        device = torch.device("cpu")

        def __init__(self):
            self.parts = type("Parts", (), {})()
            self.parts.denoiser = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)).requires_grad_(False)
            self.parts.denoiser.factor = nn.Parameter(torch.zeros(4, 8, 3, 3))
            self.flat = self
            self.zeroed = 0

        def inputs(self, batch, share):
            return {"mean": batch}

        def compute(self, inputs):
            return self.parts.denoiser[0](inputs["mean"])

        def zero_gradients(self):
            self.zeroed += 1

    return Stand()


def last(engine):
    return [module.weight.is_contiguous(memory_format=torch.channels_last) for module in engine.parts.denoiser]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(("ratio", "better"), [(0.5, True), (0.99, False), (2.0, False)])
def test_the_quicker_memory_format_is_kept(engine, fails, ratio, better):
    values = [module.weight.clone() for module in engine.parts.denoiser]

    def clock(compute):
        compute()
        return 10.0 * (ratio if all(last(engine)) else 1)

    recorder = Pretended(fails)
    chosen, why = cuda.choose_memory_format(engine, torch.randn(1, 4, 8, 8), recorder=recorder, clock=clock)
    assert chosen == better and last(engine) == [better] * 2
    assert why == f"a pass takes {10 * ratio:.1f} ms channels-last and 10.0 ms otherwise"
    assert engine.parts.denoiser.factor.is_contiguous() and engine.zeroed == 1
    assert recorder.resets == (0 if fails else 2)
    assert all(torch.equal(a, m.weight) for a, m in zip(values, engine.parts.denoiser, strict=True))


@pytest.mark.parametrize("gone", [False, True])
def test_a_run_tries_both_memory_formats_on_its_first_batch(tiny_base, style_dir, tmp_path, gone):
    flags = {
        "base.model": str(tiny_base),
        "data.images": style_dir,
        "output.output": tmp_path / "run",
        "train.pack_weights": "off",
    }
    said = []
    reporter = Reporter()
    reporter.say = said.append
    session = set_up(load_config(None, flags), None, reporter)
    session.engine.source = Philox.of(0, "sample", "cpu")  # as on CUDA

    def clock(compute):
        if gone:
            raise torch.OutOfMemoryError("fake")
        compute()
        return next(times)

    times = iter([9.0] * cuda.PASSES + [5.0] * cuda.PASSES)
    _choose_layout(session, reporter, recorder=Pretended(fails=True), clock=clock)
    kernel = next(m for m in session.parts.denoiser.modules() if type(m) is nn.Conv2d and m.kernel_size == (3, 3))
    assert kernel.weight.is_contiguous(memory_format=torch.channels_last) != gone
    assert ("Convolutions channels-last" in said[-1]) != gone
    assert gone or not session.engine.flat.gradients.any()
