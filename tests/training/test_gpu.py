"""What only a GPU can show: half precision, resume and recorded steps there. Skipped where there is none."""

import pytest
import torch
from safetensors.torch import load_file

from sdlora.attention.choose import Fastest, candidates
from sdlora.config_io import load_config
from sdlora.diffusion.counter import Philox, normal
from sdlora.training.cuda import prepare_cuda
from sdlora.training.folder import reopen
from sdlora.training.graph_cuda import CudaRecorder
from sdlora.training.progress import Reporter
from sdlora.training.setup import set_up
from sdlora.training.train import train
from tools.host_time import measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_run_on_the_gpu_exports_and_goes_on(tiny_base, style_dir, tmp_path, precision):
    flags = {
        "base.model": str(tiny_base),
        "data.images": style_dir,
        "lora.rank": 2,
        "train.precision": precision,
        "train.steps": 6,
        "train.stop_at": 3,
        "output.output": tmp_path / "run",
        "samples.sample_steps": 2,
    }
    half = train(load_config(None, flags))
    run, config = reopen(half.folder, {}, ())
    result = train(config, resume=run)
    assert result.finished
    assert result.loss_end == result.loss_end  # not NaN
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(result.lora).values())


def run_with(style_dir, tiny_base, folder, **changes):
    flags = {
        "base.model": str(tiny_base),
        "data.images": style_dir,
        "data.batch_size": 2,
        "lora.rank": 2,
        "train.precision": "fp32",
        "train.steps": 12,
        "output.output": folder,
        "output.save_dtype": "fp32",
        "samples.sample_every": 0,
    }
    result = train(load_config(None, flags | {key.replace("__", "."): value for key, value in changes.items()}))
    return result, load_file(result.lora)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_recorded_steps_train_what_plain_steps_train(tiny_base, style_dir, tmp_path, precision):
    # "on" makes it an error if any step cannot be recorded.
    _, recorded = run_with(style_dir, tiny_base, tmp_path / "on", train__cuda_graph="on", train__precision=precision)
    _, plain = run_with(style_dir, tiny_base, tmp_path / "off", train__cuda_graph="off", train__precision=precision)
    assert recorded.keys() == plain.keys()
    for key in plain:
        difference, size = (recorded[key] - plain[key]).norm(), plain[key].norm()
        assert difference <= (1e-3 if precision == "fp32" else 5e-2) * size + 1e-5, key


@pytest.mark.parametrize("changes", [{"train__accumulation": 2}, {"train__noise_offset": 0.1}], ids=str)
def test_what_else_a_step_does_can_be_recorded(tiny_base, style_dir, tmp_path, changes):
    _, recorded = run_with(style_dir, tiny_base, tmp_path / "on", train__cuda_graph="on", **changes)
    assert all(bool(tensor.isfinite().all()) for tensor in recorded.values())


def test_counters_give_the_same_words_on_the_gpu():
    places = torch.tensor([[0, 0], [7, 3]])
    there, here = (Philox.of(42, "sample", device).words(places.to(device), 999) for device in ("cuda", "cpu"))
    assert torch.equal(there.cpu(), here)
    torch.testing.assert_close(normal(there).cpu(), normal(here), rtol=1e-5, atol=1e-5)


def test_a_replay_draws_anew_where_its_places_changed():
    source, places = Philox.of(42, "sample", "cuda"), torch.tensor([[0, 0]], device="cuda")
    drawn = torch.empty(1, 40, device="cuda")
    recorder = CudaRecorder(torch.device("cuda"))
    graph = recorder.record(lambda: drawn.copy_(normal(source.words(places, 10))))
    for step in range(3):
        places[0, 0] = step
        graph.replay()
        assert torch.equal(drawn, normal(source.words(places, 10)))


def test_a_recording_that_fails_leaves_the_stream_and_memory_usable():
    device = torch.device("cuda")
    stream, x = torch.cuda.current_stream(), torch.ones(1000, device=device)
    recorder = CudaRecorder(device)
    with pytest.raises(RuntimeError):
        recorder.record(lambda: float(x.sum()))  # asks for a number, so waits for the device
    assert torch.cuda.current_stream() == stream
    assert float((x * 2).sum()) == 2000
    graph = recorder.record(lambda: x.add_(1))
    x.zero_()
    graph.replay()
    assert float(x.sum()) == 1000


@pytest.mark.parametrize(("heads", "width", "keys"), [(8, 40, 4096), (8, 40, 77), (8, 160, 64), (10, 64, 1024)])
def test_the_chosen_attention_agrees_forward_and_backward(heads, width, keys):
    kernels = candidates(torch.device("cuda"), torch.bfloat16)
    choice = Fastest(kernels)
    rng = torch.Generator().manual_seed(0)
    sizes = keys if keys > 77 else 256, keys, keys
    inputs = [torch.randn(1, heads, n, width, generator=rng).cuda().bfloat16().requires_grad_() for n in sizes]
    output = choice(*inputs)
    gradients = torch.autograd.grad(output, inputs, torch.ones_like(output))
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact)
    expected_gradients = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    for got, want in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert (got.float() - want).norm() <= 0.05 * want.norm() + 1e-2
    assert set(choice.chosen.values()) <= kernels.keys()
    print(choice.choices())


def test_switches_are_set():
    before = torch.backends.cudnn.benchmark
    prepare_cuda()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before


def test_python_is_busy_with_a_recorded_step_for_a_millisecond_at_most(tiny_base, style_dir, tmp_path):
    flags = {
        "base.model": str(tiny_base),
        "data.images": style_dir,
        "data.batch_size": 1,
        "train.steps": 40,
        "train.cuda_graph": "on",
        "samples.sample_every": 0,
        "output.output": tmp_path / "run",
    }
    times = measure(set_up(load_config(None, flags), None, Reporter()), 30)
    assert times["add"] + times["update"] < 1.0, times
