"""Which number format and which attention to train with, and why: the best that this machine has just proved to do.

What is offered here has run a forward and a backward pass first, and every choice comes with its reason, so that the
person at the terminal reads one line instead of wondering. What was asked for and does not work is refused, never
replaced in silence.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdlora.diffusion.noise import generator
from sdlora.errors import ConfigError
from sdlora.families.loading import FULL_WIDTH
from sdlora.training.device import (
    DTYPES,
    HEAD_WIDTH,
    Probe,
    architecture_problem,
    choose_device,
    describe,
    first_line,
    probe,
)

__all__ = [
    "DTYPES",
    "Backend",
    "Precision",
    "Probe",
    "attention_backends",
    "choose_attention",
    "choose_device",
    "choose_precision",
    "inference_dtype",
    "probe",
]

_AUTOMATIC: dict[str, tuple[tuple[str, str], ...]] = {
    # by device: (word, why), the best first; the first that really works is taken
    "cuda": (
        ("bf16", "half the memory of fp32 with its range, and this GPU computes it"),
        ("fp16", "half the memory of fp32, with a loss scaler"),
        ("fp32", "no half precision works on this GPU"),
    ),
    "xpu": (("bf16", "half the memory of fp32 with its range"), ("fp32", "bf16 does not work on this GPU")),
    "mps": (("fp32", "half precision is not proven on Apple GPUs; its gradients can overflow there"),),
    "cpu": (("fp32", "exact, and on this CPU or base bf16 would gain nothing"),),
}
_WIDE_ON_CPU = ("bf16", "this CPU multiplies it, at twice the speed of fp32 or more")


@dataclass(frozen=True)
class Precision:
    """The arithmetic of a run.

    Attributes:
        word: bf16, fp16 or fp32.
        reason: why; one clause for the person at the terminal.
        dtype: of the frozen base; what is learned stays fp32.
    """

    word: str
    reason: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Backend:
    """An attention implementation, tried forward and backward.

    Attributes:
        name: flash, memory-efficient, math or xformers.
        ok: it ran, and its results are finite.
        reason: how fast it was, or why it does not work.
    """

    name: str
    ok: bool
    reason: str


def choose_precision(wanted: str, device: torch.device, width: int = 0) -> Precision:
    """Returns the arithmetic to train in.

    Args:
        wanted: `auto` takes the best that works; bf16, fp16 or fp32 are taken as they are, or refused.
        device: where training runs.
        width: channels of the denoiser's first block. On a CPU small products gain nothing from bf16.

    Raises:
        ConfigError: if the device cannot compute in what was asked for, or cannot compute at all.
    """
    if wanted == "auto":
        return _automatic(device, width)
    if wanted not in DTYPES:
        raise ConfigError(f"precision must be auto, {', '.join(DTYPES)}, got {wanted!r}")
    refusal = _refusal(wanted, device)
    if refusal:
        best = _automatic(device, width).word
        raise ConfigError(f"precision {wanted} does not work on {describe(device)}: {refusal}; use auto, here {best}")
    return _precision(wanted, "as asked for")


def _automatic(device: torch.device, width: int) -> Precision:
    refusals = []
    choices = _AUTOMATIC.get(device.type, _AUTOMATIC["cpu"])
    if device.type == "cpu" and width >= FULL_WIDTH and _multiplies_bf16():
        choices = (_WIDE_ON_CPU, *choices)
    for word, reason in choices:
        refusal = _refusal(word, device)
        if refusal is None:
            return _precision(word, "; ".join([reason, *refusals]))
        refusals.append(f"not {word}: {refusal}")
    way_out = "; to train on the CPU meanwhile, set CUDA_VISIBLE_DEVICES=-1" if device.type == "cuda" else ""
    raise ConfigError(f"{describe(device)} does not compute: {refusals[-1].partition(': ')[2]}{way_out}")


def _multiplies_bf16() -> bool:
    """Tells whether the CPU has instructions for products of bf16 (AVX512-BF16 or AMX), and torch uses them."""
    instructions = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return instructions and torch.backends.mkldnn.is_available()


def _refusal(word: str, device: torch.device) -> str | None:
    if word == "fp16" and device.type == "cpu":
        return "a CPU computes fp16 several times slower than fp32, and less exactly"
    if word == "bf16" and device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):  # it runs, slower than fp32
            return f"this GPU only emulates it (compute capability {capability[0]}.{capability[1]}, and it takes 8.0)"
    return probe(device, DTYPES[word]).error


def _precision(word: str, reason: str) -> Precision:
    return Precision(word, reason, DTYPES[word])


def inference_dtype(device: torch.device) -> torch.dtype:
    """Returns the format to draw pictures in: fp16 on GPUs where it works, as other programs use, else fp32.

    fp16 carries three bits more than bf16 and nothing here needs bf16's range, for the VAE stays fp32.
    """
    half = device.type in ("cuda", "xpu") and probe(device, torch.float16).ok
    return torch.float16 if half else torch.float32


def attention_backends(device: torch.device, dtype: torch.dtype | None = None) -> list[Backend]:
    """Tries torch's attention kernels and, if it is installed, xformers: forward and backward, one result each.

    Args:
        device: where to try them.
        dtype: in which format; `None` takes what `choose_precision` would.

    Raises:
        ConfigError: if the device cannot compute at all.
    """
    dtype = dtype or choose_precision("auto", device).dtype
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    found = []
    for name, kernel in kernels.items():
        with sdpa_kernel(kernel):
            found.append(_try_attention(name, F.scaled_dot_product_attention, device, dtype))
    if importlib.util.find_spec("xformers"):
        found.append(_try_xformers(device, dtype))
    return found


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """Returns the attention implementation, `sdpa` or `xformers`, and why.

    Args:
        wanted: `auto` and `sdpa` take torch's own; `xformers` is tried first.
        device: where training runs.
        dtype: in which format; `None` takes what `choose_precision` would.

    Raises:
        ConfigError: if xformers is wanted and does not work here.
    """
    if wanted == "auto":
        return "sdpa", "torch's own, which takes the fastest of its kernels"
    if wanted == "sdpa":
        return "sdpa", "as asked for"
    if wanted != "xformers":
        raise ConfigError(f"attention must be auto, sdpa or xformers, got {wanted!r}")
    if not importlib.util.find_spec("xformers"):
        raise ConfigError("attention xformers is not installed: pip install 'sdlora[xformers]', or use attention sdpa")
    result = _try_xformers(device, dtype or choose_precision("auto", device).dtype)
    if not result.ok:
        raise ConfigError(f"attention xformers does not work on {describe(device)}: {result.reason}; use sdpa")
    return "xformers", "as asked for, and " + result.reason


def _try_xformers(device: torch.device, dtype: torch.dtype) -> Backend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ops = importlib.import_module("xformers.ops")
        return ops.memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    return _try_attention("xformers", attend, device, dtype)


def _try_attention(name: str, attend: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Backend:
    rng = generator("attention probe")
    with warnings.catch_warnings(record=True) as said:  # torch gives its reasons as warnings
        warnings.simplefilter("always")
        try:
            start_values = [torch.randn(2, 2, 256, HEAD_WIDTH, generator=rng) for _ in range(3)]
            qkv = [t.to(device, dtype).requires_grad_() for t in start_values]
            _attend_and_back(attend, qkv)  # the first call also loads kernels
            start = time.perf_counter()
            finite = _attend_and_back(attend, qkv)
            milliseconds = (time.perf_counter() - start) * 1000
        except Exception as error:  # as in `probe`: each kind means "does not work"
            return Backend(name, False, _why(error, [str(w.message) for w in said], device))
    if not finite:
        return Backend(name, False, "its results are not finite")
    return Backend(name, True, f"ran forward and backward in {milliseconds:.1f} ms")


def _attend_and_back(attend: Callable[..., Tensor], qkv: list[Tensor]) -> bool:
    y = attend(*qkv)
    gradients = torch.autograd.grad(y.sum(), qkv)
    return all(bool(t.isfinite().all()) for t in (y, *gradients))


def _why(error: Exception, said: Sequence[str], device: torch.device) -> str:
    if "No viable backend" not in str(error) and "No available kernel" not in str(error):
        return architecture_problem(device) or first_line(error)
    reasons = [text.partition(" (Triggered internally")[0].strip() for text in said]
    reasons = [text for text in reasons if text and not text.endswith("because:")]
    return reasons[-1] if reasons else f"torch has no such kernel for {device.type}"
