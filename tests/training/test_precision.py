"""Devices, number formats and attention: what is offered has run, and what does not work is refused with a way out."""

import importlib.util
import re

import pytest
import torch

from sdlora.errors import ConfigError
from sdlora.training import device as device_room
from sdlora.training import precision as precision_room
from sdlora.training.device import architecture_problem, describe, missing_kernels
from sdlora.training.precision import (
    DTYPES,
    attention_backends,
    choose_attention,
    choose_device,
    choose_precision,
    inference_dtype,
    probe,
)

CPU = torch.device("cpu")
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_automatic_device_exists_and_computes():
    device = choose_device()
    assert torch.ones(2, device=device).sum().item() == 2
    assert choose_device("cpu") == CPU
    if torch.cuda.is_available():
        assert device.type == "cuda"


@pytest.mark.parametrize("name", ["toaster", "", "cuda:x"])
def test_a_device_that_is_none_is_refused(name):
    with pytest.raises(ConfigError, match=r"no device is called .*this machine has .*cpu"):
        choose_device(name)


@pytest.mark.parametrize("name", ["meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(ConfigError, match="finds"):
        choose_device(name)


@pytest.mark.parametrize("word", ["fp32", "bf16"])
def test_probe_runs_and_says_how_long(word):
    result = probe(CPU, DTYPES[word])
    assert result.ok and result.error is None
    assert result.milliseconds is not None and result.milliseconds > 0


def test_probe_does_not_touch_the_global_seed():
    before = torch.get_rng_state()
    probe.__wrapped__(CPU, torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_probe_reports_what_torch_says():
    for device, dtype in [(CPU, torch.int8), (torch.device("meta"), torch.float32)]:
        result = probe(device, dtype)
        assert not result.ok and result.error and result.milliseconds is None
        assert "\n" not in result.error


def test_probe_refuses_numbers_that_are_off(monkeypatch):
    real = device_room._trial

    def skewed(device, dtype):
        values = real(device, torch.float32)
        return values if dtype == torch.float32 else {**values, "output": values["output"] * float("nan")}

    monkeypatch.setattr(device_room, "_trial", skewed)
    result = probe.__wrapped__(CPU, torch.bfloat16)
    assert not result.ok and result.error.startswith("wrong result: output")


@pytest.mark.parametrize(
    ("width", "instructions", "word"),
    [(0, True, "fp32"), (64, True, "fp32"), (320, False, "fp32"), (320, True, "bf16")],
)
def test_automatic_precision_on_a_cpu_is_bf16_where_that_is_multiplied_and_pays(monkeypatch, width, instructions, word):
    monkeypatch.setattr(precision_room, "_multiplies_bf16", lambda: instructions)
    precision = choose_precision("auto", CPU, width)
    assert (precision.word, precision.dtype) == (word, {"fp32": torch.float32, "bf16": torch.bfloat16}[word])
    assert "CPU" in precision.reason


def test_bf16_on_a_cpu_is_given_when_asked_for():
    precision = choose_precision("bf16", CPU)
    assert (precision.word, precision.dtype) == ("bf16", torch.bfloat16)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match=r"precision fp16 does not work on the CPU: .*use auto, here fp32"):
        choose_precision("fp16", CPU)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="auto, bf16, fp16, fp32, got 'fp8'"):
        choose_precision("fp8", CPU)


def test_a_device_that_cannot_compute_is_refused():
    with pytest.raises(ConfigError, match="meta does not compute"):
        choose_precision("auto", torch.device("meta"))


def test_pictures_are_drawn_in_fp32_on_a_cpu():
    assert inference_dtype(CPU) == torch.float32


def test_attention_backends_are_tried_one_by_one():
    found = {backend.name: backend for backend in attention_backends(CPU)}
    assert list(found)[:3] == ["flash", "memory-efficient", "math"]
    assert found["math"].ok and " ms" in found["math"].reason
    assert not found["memory-efficient"].ok and "no such kernel for cpu" in found["memory-efficient"].reason
    assert ("xformers" in found) == (importlib.util.find_spec("xformers") is not None)


def test_attention_is_torchs_own_unless_asked():
    assert choose_attention("auto", CPU)[0] == choose_attention("sdpa", CPU)[0] == "sdpa"
    with pytest.raises(ConfigError, match="auto, sdpa or xformers, got 'flash'"):
        choose_attention("flash", CPU)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_that_is_not_installed_is_refused():
    with pytest.raises(ConfigError, match=r"not installed: pip install 'sdlora\[xformers\]'"):
        choose_attention("xformers", CPU)


def test_xformers_that_does_not_work_is_refused(tmp_path, monkeypatch):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("")
    (tmp_path / "xformers" / "ops.py").write_text("raise OSError('undefined symbol: _ZN5torch')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"xformers does not work on the CPU: undefined symbol: .*use sdpa"):
        choose_attention("xformers", CPU)


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((8, 9), ["sm_80", "sm_90"]),  # same major, older minor
        ((9, 0), ["sm_90a"]),
        ((12, 1), ["sm_75", "sm_120"]),
        ((12, 0), ["sm_90", "compute_90"]),  # PTX is compiled on the spot
        ((10, 3), ["sm_100f"]),
    ],
)
def test_a_build_serves_a_gpu(capability, built_for):
    assert missing_kernels(capability, built_for) is None


@pytest.mark.parametrize(
    ("capability", "built_for", "advice"),
    [
        ((6, 1), ["sm_75", "sm_80", "sm_90", "compute_120"], r"no kernels for sm_61, only for sm_75.*CUDA 12\.6"),
        ((7, 0), ["sm_75", "sm_80"], r"sm_70.*CUDA 12\.6"),
        ((12, 0), ["sm_80", "sm_90"], r"sm_120.*CUDA 13\.0 or newer"),
        ((8, 0), ["sm_86"], r"sm_80.*CUDA 12\.8 or newer"),
        ((12, 0), ["compute_90a", "sm_100f", "compute_100f"], "sm_120"),  # such code runs on its own kind only
        ((8, 0), [], "only for no GPU"),
    ],
)
def test_a_build_without_kernels_for_a_gpu_says_which_one_has_them(capability, built_for, advice):
    problem = missing_kernels(capability, built_for)
    assert problem is not None
    assert re.search(advice, problem), problem


def test_a_cpu_has_no_architecture_problem():
    assert architecture_problem(CPU) is None
    assert describe(CPU) == "the CPU"


class TestGpu:
    pytestmark = gpu

    def test_auto_takes_the_best_that_works(self):
        device = choose_device("cuda")
        precision = choose_precision("auto", device)
        modern = torch.cuda.get_device_capability() >= (8, 0)
        assert precision.word == ("bf16" if modern else "fp16")
        assert probe(device, precision.dtype).ok
        assert inference_dtype(device) == torch.float16

    def test_some_attention_kernel_besides_math_works(self):
        found = {b.name: b for b in attention_backends(choose_device("cuda"))}
        assert found["math"].ok and (found["flash"].ok or found["memory-efficient"].ok), found
