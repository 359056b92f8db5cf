"""Which attention kernel is fastest, measured here for each shape, forward and backward, before it is first used.

Legend: B batch, H heads, n queries, m keys, d head width.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdlora.attention.processor import Kernel
from sdlora.attention.products import attention as products

ROUNDS = 5
"""Times each candidate runs; the quickest counts."""
LEAST_GAIN = 0.0025
"""Seconds, forward and backward, for which it is worth to leave the standard: others need two dozen operations more."""


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends with torch's own choice of kernel."""
    return F.scaled_dot_product_attention(query, key, value)


def in_fp32(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends with torch's kernel in fp32, which is quicker than bf16 on a CPU for small narrow heads."""
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)


CPU_KERNELS: Mapping[str, Kernel] = {"sdpa": sdpa, "products": products, "fp32": in_fp32}
"""Candidates for half precision on a CPU."""


def only(backend: SDPBackend) -> Kernel:
    """Returns a kernel that attends with one of torch's back ends, and fails where that one cannot."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    return attend


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends with xformers, which wants the heads behind the tokens."""
    ops = importlib.import_module("xformers.ops")
    mixed: Tensor = ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return mixed.transpose(1, 2)


CUDA_KERNELS: Mapping[str, Kernel] = {
    "sdpa": sdpa,
    "cudnn": only(SDPBackend.CUDNN_ATTENTION),
    "flash": only(SDPBackend.FLASH_ATTENTION),
    "efficient": only(SDPBackend.EFFICIENT_ATTENTION),
    "xformers": xformers,
}
"""Candidates for half precision on CUDA. Which of them a GPU has for a head width is found out by trying."""


def candidates(device: torch.device, dtype: torch.dtype) -> Mapping[str, Kernel] | None:
    """Returns the kernels to choose from on a device, the standard first; `None` where there is no choice."""
    known = {("cpu", torch.bfloat16): CPU_KERNELS}
    known |= {("cuda", half): CUDA_KERNELS for half in (torch.bfloat16, torch.float16)}
    found = known.get((device.type, dtype))
    if found and not importlib.util.find_spec("xformers"):
        found = {name: kernel for name, kernel in found.items() if name != "xformers"}
    return found


class Fastest:
    """The fastest of several kernels for each shape; itself a kernel.

    Args:
        candidates: by name; the first is the standard that the others must agree with.
        told: called after each choice.

    Attributes:
        chosen: (n, m, H, d) -> name of the kernel.
    """

    def __init__(self, candidates: Mapping[str, Kernel], told: Callable[[], None] = lambda: None) -> None:
        self.candidates, self.told = candidates, told
        self.chosen: dict[tuple[int, int, int, int], str] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends; without gradients always as the standard does, so that pictures do not depend on a measurement."""
        if not torch.is_grad_enabled():
            return next(iter(self.candidates.values()))(query, key, value)
        shape = query.shape[2], key.shape[2], query.shape[1], query.shape[3]
        if shape not in self.chosen:
            self.chosen[shape] = self._measure(query, key, value)
            self.told()
        try:
            return self.candidates[self.chosen[shape]](query, key, value)
        except OverflowError:
            self.chosen[shape] = next(iter(self.candidates))
            return self(query, key, value)

    def choices(self) -> dict[str, str]:
        """Returns what was chosen, to be kept: a run that is resumed or repeated must not choose otherwise."""
        return {" ".join(map(str, shape)): name for shape, name in self.chosen.items()}

    def restore(self, choices: Mapping[str, str]) -> None:
        """Takes up what `choices` returned."""
        for shape, name in choices.items():
            n, m, heads, d = map(int, shape.split())
            if name in self.candidates:
                self.chosen[n, m, heads, d] = name

    def _measure(self, *inputs: Tensor) -> str:
        tried = [x.detach().clone().requires_grad_() for x in inputs]
        clock = _CLOCKS.get(tried[0].device.type, _time)
        # Within a checkpointed block, what is saved here must not count as the block's, so it passes hooks of its own.
        mine = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with torch.enable_grad(), mine, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a back end that cannot gives its reasons as warnings
            expected = _run(next(iter(self.candidates.values())), tried)
            good = [name for name, kernel in self.candidates.items() if _right(kernel, tried, expected)]
            # By turns, so that what else the machine does meets all of them; the quickest run counts.
            rounds = [{name: clock(self.candidates[name], tried) for name in good} for _ in range(ROUNDS)]
        times = {name: min(times[name] for times in rounds) for name in good}
        best = min(times, key=times.__getitem__)
        return best if times[best] + LEAST_GAIN < times[good[0]] else good[0]


def _run(kernel: Kernel, inputs: list[Tensor]) -> list[Tensor]:
    output = kernel(*inputs)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return [output, *torch.autograd.grad((output * pull).sum(), inputs)]


def _time(kernel: Kernel, inputs: list[Tensor]) -> float:
    start = time.perf_counter()
    _run(kernel, inputs)
    return time.perf_counter() - start


def _time_on_cuda(kernel: Kernel, inputs: list[Tensor]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    pull = torch.ones_like(inputs[0])
    # The GPU is kept waiting until all kernels are queued, for what counts is its time, not Python's.
    torch.cuda._sleep(_WAIT_CYCLES)
    start.record()
    for _ in range(_REPEATS):
        torch.autograd.grad(kernel(*inputs), inputs, pull)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


_WAIT_CYCLES = 5_000_000
"""Some three milliseconds."""
_REPEATS = 4
_CLOCKS: Mapping[str, Callable[[Kernel, list[Tensor]], float]] = {"cuda": _time_on_cuda}


def _right(kernel: Kernel, inputs: list[Tensor], expected: list[Tensor]) -> bool:
    try:
        got = _run(kernel, inputs)
    except (OverflowError, RuntimeError, ValueError, NotImplementedError, ImportError):  # each means: not here
        return False
    return all(_agrees(a, b) for a, b in zip(got, expected, strict=True))


def _agrees(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).norm() <= 0.05 * b.float().norm() + 1e-3)
