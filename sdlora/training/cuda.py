"""How torch computes on CUDA: every switch that it has is set on purpose here, none is left as it happens to be."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import nn

from sdlora.training.engine import Engine, Inputs
from sdlora.training.graph_cuda import CudaRecorder
from sdlora.training.recording import Recorder
from sdlora.training.step import Microbatch

PASSES = 3
"""Timed passes in each memory format; the quickest counts."""
GAIN = 0.98
"""Share of the time that another memory format must not exceed to be taken."""


def prepare_cuda(deterministic: bool = False) -> None:
    """Sets torch's switches for training on CUDA; does nothing where there is none.

    - fp32 matrix products in full, without TF32: in a run in half precision those that are left are the products that
      make and certify LoRA files, which must be exact and take no time, and whoever asks for fp32 wants fp32.
    - Convolutions in fp32 may use TF32, as torch has it by default. In a run in half precision these are the VAE's,
      once for each picture: TF32 keeps 10 bits of mantissa, three more than the bf16 that the denoiser sees them in.
    - Sums inside half-precision products in fp32: a LoRA's gradients sum up thousands of tokens for few outputs, just
      the products that are split, and partial sums in bf16 would cost them bits. fp16 could also overflow.
    - cuDNN tries its algorithms for each shape: buckets give few shapes, which come again and again. Which one wins may
      differ between runs, so not where these must be equal.

    Args:
        deterministic: whether sums are made in a fixed order everywhere, at the cost of time.
    """
    if not torch.cuda.is_available():
        return
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def choose_memory_format(
    engine: Engine,
    batch: Microbatch,
    *,
    recorder: Recorder | None = None,
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> tuple[bool, str]:
    """Stores the denoiser's convolutions channels-last if its forward and backward pass is then faster.

    Graphs are measured, for without them a small batch shows how fast Python is, not the GPU; where recording fails,
    the passes themselves. Due before the first step: the gradients are zeros afterwards.

    Args:
        engine: as it trains.
        batch: of the most frequent kind.
        recorder: makes the graphs; `None` takes CUDA's.
        clock: returns the milliseconds of a computation; `None` takes CUDA's.

    Returns:
        Whether it is channels-last now, and why.
    """
    recorder = recorder or CudaRecorder(engine.device)
    clock = clock or _milliseconds
    denoiser = engine.parts.denoiser
    # A graph reads its inputs where they lay when it was recorded, so they are kept there.
    inputs = {name: x.to(engine.device) for name, x in engine.inputs(batch, 1.0).items()}
    before = _pass_time(engine, inputs, recorder, clock)
    store_convolutions(denoiser, torch.channels_last)
    after = _pass_time(engine, inputs, recorder, clock)
    engine.flat.zero_gradients()
    better = after <= GAIN * before
    if not better:
        store_convolutions(denoiser, torch.contiguous_format)
    return better, f"a pass takes {after:.1f} ms channels-last and {before:.1f} ms otherwise"


def store_convolutions(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Stores the frozen weights of plain convolutions in a memory format; factors of adapters stay as they are."""
    for module in model.modules():
        if type(module) is nn.Conv2d and not module.weight.requires_grad:
            module.weight.data = module.weight.data.contiguous(memory_format=memory_format)


def _pass_time(
    engine: Engine, inputs: Inputs, recorder: Recorder, clock: Callable[[Callable[[], object]], float]
) -> float:
    def compute() -> object:
        return engine.compute(inputs)

    compute()  # loads kernels, lets cuDNN and attention choose
    try:
        recording = recorder.record(compute)
    except RuntimeError:
        return min(clock(compute) for _ in range(PASSES))
    try:
        return min(clock(recording.replay) for _ in range(PASSES))
    finally:
        recording.reset()


def _milliseconds(compute: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    compute()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
