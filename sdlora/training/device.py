"""Which devices there are, and whether they really compute: found out by trying, not by believing.

Arch lists, version numbers and `is_available` have all been wrong for somebody. So a device counts as good for a number
format only when a small forward and backward pass in it has run, here and now, and came out right.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdlora.diffusion.noise import generator
from sdlora.errors import ConfigError
from sdlora.families import Parts
from sdlora.families.loading import FULL_WIDTH

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_AVAILABLE: dict[str, Callable[[], bool]] = {  # in the order of preference
    "cuda": torch.cuda.is_available,
    "mps": torch.backends.mps.is_available,
    "xpu": torch.xpu.is_available,
    "cpu": lambda: True,
}

_TOLERANCE = 0.05  # bf16 keeps 8 bits, 0.4 % a rounding, and a trial chains about five roundings each way
HEAD_WIDTH = 40  # of SD 1.5's first blocks, and no power of two: where attention kernels are pickiest


@dataclass(frozen=True)
class Probe:
    """What came of trying a number format on a device.

    Attributes:
        ok: it ran forward and backward and agrees with fp32 on the CPU.
        error: what went wrong, one line, or `None`.
        milliseconds: of one warm forward and backward pass, or `None` if it failed.
    """

    ok: bool
    error: str | None
    milliseconds: float | None


def choose_threads(parts: Parts, wanted: int | None = None) -> int:
    """Sets, and returns, the number of CPU threads that torch computes with.

    A narrow denoiser on the CPU gets one, unless the user decided: its operations are so small that threads mostly wait
    for each other, and they wait by spinning. Measured on 2 cores, nano, rank 16, batch 4, forward and backward: one
    thread 0.22 s, two threads 0.17 s, and two threads 1.9 s as soon as another program keeps one core busy.

    Args:
        parts: the base.
        wanted: the user's number; `None` decides by the base. `OMP_NUM_THREADS` in the environment also counts as one.
    """
    denoiser: Any = parts.denoiser
    narrow = max(denoiser.config["block_out_channels"]) < FULL_WIDTH
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif narrow and parts.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    return torch.get_num_threads()


def choose_device(name: str = "auto") -> torch.device:
    """Returns the device to train on.

    Args:
        name: `auto` takes the first there is of cuda, mps, xpu and cpu; else one of these, or e.g. `cuda:1`.

    Raises:
        ConfigError: if there is no such device on this machine.
    """
    if name == "auto":
        return torch.device(next(kind for kind, available in _AVAILABLE.items() if available()))
    found = [kind for kind, available in _AVAILABLE.items() if available()]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"no device is called {name!r}; this machine has {', '.join(found)}") from None
    if device.type not in found:
        raise ConfigError(
            f"torch {torch.__version__} finds no {name} here, only {', '.join(found)}; see `sdlora doctor`"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no {name}: torch finds {torch.cuda.device_count()} GPU(s), numbered from 0")
    return device


def describe(device: torch.device) -> str:
    """Names a device for a person, e.g. `NVIDIA L4 (compute capability 8.9)`."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
    if device.type == "xpu":
        return str(torch.xpu.get_device_name(device))
    return {"mps": "the Apple GPU", "cpu": "the CPU"}.get(device.type) or device.type


def missing_kernels(capability: tuple[int, int], built_for: Sequence[str]) -> str | None:
    """Tells whether a torch build lacks code for a GPU, and which build has it.

    Args:
        capability: the GPU's compute capability, e.g. (8, 9).
        built_for: as `torch.cuda.get_arch_list()` returns it, e.g. `["sm_80", "sm_90a", "compute_120"]`.

    Returns:
        `None` if the GPU is served, else what is wrong and what to install.

    Source: CUDA C++ Programming Guide, "Binary compatibility" (same major, same or older minor) and "PTX compatibility"
    (same or older), with the suffixes a (this GPU only) and f (this major only); PyTorch's RELEASE.md, "CUDA Support
    Matrix", for 2.11 to 2.14.
    """
    for name in built_for:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if not match:
            continue
        arch, portable = (int(match[2]), int(match[3])), not match[4]
        same_major = arch[0] == capability[0] and arch <= capability and match[4] != "a"
        if arch == capability or same_major or (match[1] == "compute" and portable and arch <= capability):
            return None
    here = f"sm_{capability[0]}{capability[1]}"
    build = "12.6" if capability < (7, 5) else "13.0 or newer" if capability >= (10, 0) else "12.8 or newer"
    return (
        f"this torch ({torch.__version__}) has no kernels for {here}, only for {' '.join(built_for) or 'no GPU'}; "
        f"install the build for CUDA {build}, see pytorch.org/get-started"
    )


@cache
def probe(device: torch.device, dtype: torch.dtype) -> Probe:
    """Runs a convolution, linear layers and attention forward and backward, and compares with fp32 on the CPU.

    It takes milliseconds once the device is awake. Answers are remembered as long as the program runs.
    """
    try:
        expected = _trial(torch.device("cpu"), torch.float32)
        got = _trial(device, dtype)  # the first call also loads kernels
        times = []
        for _ in range(3):  # the quickest, for other programs run here too
            start = time.perf_counter()
            got = _trial(device, dtype)
            times.append(time.perf_counter() - start)
    except Exception as error:  # torch raises a dozen kinds here; each means "does not work"
        problem = architecture_problem(device)
        return Probe(False, problem or first_line(error), None)
    for name, value in got.items():
        distance = float((value - expected[name]).norm() / expected[name].norm())
        if not distance <= _TOLERANCE:  # so that NaN fails too
            return Probe(False, f"wrong result: {name} is {distance:.0%} away from fp32 on the CPU", None)
    return Probe(True, None, min(times) * 1000)


def _trial(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    rng = generator("precision probe")
    heads, width = 2, 2 * HEAD_WIDTH
    kernel = torch.randn(width, 8, 3, 3, generator=rng) / 72**0.5
    qkv = torch.randn(3 * width, width, generator=rng) / width**0.5
    out = torch.randn(width, width, generator=rng) / width**0.5
    x = torch.randn(2, 8, 16, 16, generator=rng)
    pull = torch.randn(2, 256, width, generator=rng).to(device, dtype)
    inputs = [t.to(device, dtype).requires_grad_() for t in (x, kernel, qkv, out)]
    x, kernel, qkv, out = inputs
    tokens = F.conv2d(x, kernel, padding=1).flatten(2).transpose(1, 2)
    q, k, v = F.linear(tokens, qkv).unflatten(2, (3, heads, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = F.linear(mixed, out)
    gradients = torch.autograd.grad((y * pull).sum(), inputs)  # with `pull` given, torch imports a computer algebra
    names = ("output", "gradient of the input", "of the convolution", "of attention", "of the linear layer")
    return {name: t.detach().float().cpu() for name, t in zip(names, (y, *gradients), strict=True)}


def architecture_problem(device: torch.device) -> str | None:
    """Tells whether this torch lacks code for this GPU, and what to install; see `missing_kernels`."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return missing_kernels(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())


def first_line(error: Exception) -> str:
    """Returns the part of a library's error message that fits into a table."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
