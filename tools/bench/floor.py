"""The least time that a step could take: its multiplications and additions at the machine's best measured rate."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tools.bench.bases import hollow_base
from tools.bench.inputs import make_inputs
from tools.bench.measure import wait
from tools.bench.reference import predict
from tools.bench.rows import REFERENCE_TARGETS, Row

SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
"""Sides of the square products that are tried."""
TRIALS = 5


def count_flop(row: Row) -> int:
    """Returns the floating point operations that a step of a row cannot do without, two for each multiply-add.

    flop = forward(linear, convolution) + backward-data(the same, from the first adapted layer on)
         + attention's 4 B H N M d forward and 8 B H N M d backward.

    They are counted on the meta device, over the diffusers denoiser with frozen weights and a LoRA of rank 1, which
    lets just those gradients flow that training needs and adds next to nothing itself; attention counts as its
    products, 2 forward and 4 backward. What checkpointing or a flash kernel computes again is not counted.
    """
    return row.batch * _one_picture(row.base, row.side)


@cache
def _one_picture(base: str, side: int) -> int:
    row = Row(name="", group="", base=base, side=side, batch=1)
    parts = hollow_base(row)
    denoiser: Any = parts.denoiser
    denoiser.requires_grad_(False)
    inputs = make_inputs(row, parts, 1)[0]
    with torch.device("meta"):
        denoiser.add_adapter(LoraConfig(r=1, target_modules=list(REFERENCE_TARGETS)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        predict(denoiser, inputs.drawn.latents, inputs.drawn.t, inputs.conditioning).sum().backward()
    return counter.get_total_flops()


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the floating point operations a second of the machine's best square product: the best of all trials."""
    best = 0.0
    for side in SIZES[device.type]:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        for _ in range(TRIALS):
            wait(device)
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            wait(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best
