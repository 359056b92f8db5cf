"""The proof that a LoRA file is what was trained: read back, compared layer by layer, and run through the denoiser.

A LoRA that was written wrong still loads, and the picture is merely different. So a file is not believed until its own
bytes, read through the same door as a stranger's, do what the adapters in memory do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.adapters import Lora
from sdlora.container import open_container
from sdlora.diffusion.noise import generator
from sdlora.errors import LoraFileError
from sdlora.families import Family, Parts
from sdlora.files.formats import ALPHA, DOWN, UP
from sdlora.files.kohya import DTYPE_WORDS, LoraFile, ModuleWeights, module_names, read_lora, update_norm

TOLERANCES = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference of the denoiser's output, relative to its largest value, by number format of the file.

Source: about ten times the rounding unit (2^-24, 2^-11, 2^-8); rounding errors of some hundred layers hardly add up.
"""

BASE_TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The same by number format of the base, which rounds the least difference up to a whole unit of its own.

Source: five times and more what is measured on a UNet of SD 1.5's depth and half its width, whatever the adapters'
size: 0.002 in fp16, 0.019 in bf16.
"""

GPU_TOLERANCE = 1e-4
"""At least this on a GPU, whose kernels may add up in another order at every call."""

PROMPT = "a castle on a hill"
LATENT_SIDE = 16


@dataclass(frozen=True)
class Certificate:
    """What was checked and found good.

    Attributes:
        num_keys: tensors in the file.
        num_modules: layers that it changes.
        max_relative_difference: largest ||file - memory|| / ||memory|| of a layer's change.
        dtype: number format: fp16, bf16 or fp32.
        bytes: size of the file.
        sha256: of the whole file.
    """

    num_keys: int
    num_modules: int
    max_relative_difference: float
    dtype: str
    bytes: int
    sha256: str


def certify(
    path: Path,
    adapters: Mapping[str, Mapping[str, Lora]],
    parts: Parts,
    tolerance: float | None = None,
) -> Certificate:
    """Reads a LoRA file back and proves that it is what the adapters in memory are. Changes nothing.

    Args:
        path: the file just written from `adapters`.
        adapters: component -> path -> adapter, in place in `parts`.
        parts: the base.
        tolerance: on the denoiser's output, relative to its largest value; default: by the number formats of the
            file and of the base.

    Raises:
        LoraFileError: naming the first module that is not what was trained.
    """
    lora = read_lora(path)
    named = module_names(adapters, parts.family)
    keys = set(open_container(path).entries)
    _require_keys(path, keys, {name + suffix for name in named for suffix in (DOWN, UP, ALPHA)})
    worst = max(_compare(path, name, adapter, lora.modules[name]) for name, adapter in named.items())
    _require_same_output(lora, adapters, parts, tolerance)
    content = path.read_bytes()
    return Certificate(
        num_keys=len(keys),
        num_modules=len(named),
        max_relative_difference=worst,
        dtype=DTYPE_WORDS[lora.dtype],
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _require_keys(path: Path, found: set[str], expected: set[str]) -> None:
    if found != expected:
        missing, surplus = sorted(expected - found), sorted(found - expected)
        raise LoraFileError(
            f"{path} failed its check: {len(missing)} keys are missing and {len(surplus)} are too many, "
            f"the first is {(missing or surplus)[0]}"
        )


def _compare(path: Path, name: str, adapter: Lora, weights: ModuleWeights) -> float:
    """Returns the relative difference of a layer's change, after checking that rounding explains it.

    Each number in the file may differ from the one in memory by half a unit in its last place. What that can do to the
    product of the factors follows from ||U'D' - UD|| <= ||U' - U|| ||D'|| + ||U|| ||D' - D||.
    """
    down, up = (t.detach().cpu().double() for t in (adapter.down, adapter.up))
    if (down.shape, up.shape) != (weights.down.shape, weights.up.shape):
        raise LoraFileError(
            f"{path} failed its check: {name} has down {list(weights.down.shape)}, up {list(weights.up.shape)}; "
            f"trained were down {list(down.shape)}, up {list(up.shape)}"
        )
    down, up = down.flatten(1), up.flatten(1)
    file_down, file_up = weights.down.double().flatten(1), weights.up.double().flatten(1)
    if torch.equal(down, file_down) and torch.equal(up, file_up) and weights.alpha == adapter.alpha:
        return 0.0
    norm = update_norm(down, up, adapter.scale)
    both_up = torch.cat([file_up * weights.scale, -up * adapter.scale], dim=1)
    difference = update_norm(torch.cat([file_down, down]), both_up, 1.0)
    info = torch.finfo(weights.down.dtype)
    allowed = _rounding(up, info) * _norm(file_down) + _norm(up) * _rounding(down, info)
    # alpha is rounded too; 1e-7 is the square root of what fp64 leaves of the difference of two equal squares.
    allowed += (info.eps / 2 + 1e-7) * _norm(up) * _norm(down)
    if not difference <= 1.01 * abs(adapter.scale) * allowed:
        relative = difference / max(norm, 1e-300)
        raise LoraFileError(
            f"{path} failed its check: the change of {name} differs from the trained one by {relative:.2g} of its "
            f"size, more than rounding to {DTYPE_WORDS[weights.down.dtype]} explains; the file was written wrong, "
            "please report this"
        )
    return difference / norm if norm else 0.0


def _rounding(values: Tensor, info: torch.finfo) -> float:
    """Bounds the norm of what rounding does to values: half a last place, or half the smallest step near zero."""
    return _norm(torch.clamp(values.abs() * info.eps / 2, min=info.smallest_normal * info.eps / 2))


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values))


@contextmanager
def file_values(adapters: Mapping[str, Mapping[str, Lora]], lora: LoraFile, family: Family) -> Iterator[None]:
    """Lets live adapters hold a file's values for the time of a `with` block, then their own again, bit for bit.

    Args:
        adapters: component -> path -> adapter.
        lora: a file with exactly these modules.
        family: names the modules.

    Raises:
        LoraFileError: if the file's modules are not those of the adapters.
    """
    named = module_names(adapters, family)
    if set(named) != set(lora.modules):
        raise LoraFileError(f"{lora.path} holds other modules than the adapters in memory")
    for name, adapter in named.items():
        weights = lora.modules[name]
        if (weights.down.shape, weights.up.shape) != (adapter.down.shape, adapter.up.shape):
            raise LoraFileError(f"{lora.path}: {name} has another rank or shape than the adapter in memory")
    own = {n: (a.down.detach().clone(), a.up.detach().clone(), a.alpha) for n, a in named.items()}
    try:
        for name, adapter in named.items():
            weights = lora.modules[name]
            _fill(adapter, weights.down, weights.up, weights.alpha)
        yield
    finally:
        for name, adapter in named.items():
            _fill(adapter, *own[name])


@torch.no_grad()
def _fill(adapter: Lora, down: Tensor, up: Tensor, alpha: float) -> None:
    adapter.down.copy_(down)
    adapter.up.copy_(up)
    adapter.alpha = alpha


def _require_same_output(
    lora: LoraFile, adapters: Mapping[str, Mapping[str, Lora]], parts: Parts, tolerance: float | None
) -> None:
    with _evaluating(parts):
        memory = _output(parts)
        with file_values(adapters, lora, parts.family):
            file = _output(parts)
    if tolerance is None:
        least = 0.0 if parts.device.type == "cpu" else GPU_TOLERANCE
        tolerance = max(TOLERANCES[lora.dtype], BASE_TOLERANCES[parts.dtype], least)
    if not torch.isfinite(memory).all():
        raise LoraFileError(
            f"{lora.path} failed its check: with these adapters the denoiser returns values that are not finite; "
            "the training has broken down. Lower the learning rate"
        )
    largest = memory.abs().max().item()
    difference = (file - memory).abs().max().item()
    if not difference <= tolerance * largest:
        relative = difference / max(largest, 1e-300)
        raise LoraFileError(
            f"{lora.path} failed its check: with the file's values the denoiser's output differs by {relative:.2g} of "
            f'its largest value, and {tolerance:g} is allowed; use output.save_dtype = "fp32"'
        )


@torch.no_grad()
def _output(parts: Parts) -> Tensor:
    """Runs text encoder and denoiser once, on a fixed prompt and small fixed latents."""
    denoiser: Any = parts.denoiser
    shape = (1, denoiser.config["in_channels"], LATENT_SIDE, LATENT_SIDE)
    latents = torch.randn(shape, generator=generator("certify")).to(parts.device, parts.dtype)
    conditioning = parts.family.encode_prompts(parts, [PROMPT], 1)
    conditioning = {key: value.to(parts.device, parts.dtype) for key, value in conditioning.items()}
    t = torch.tensor([len(parts.schedule) // 2], device=parts.device)
    return parts.family.denoise(parts, latents, t, conditioning).float().cpu()


@contextmanager
def _evaluating(parts: Parts) -> Iterator[None]:
    """Switches dropout off in all components, and each module back to what it was."""
    before = [(module, module.training) for model in parts.components.values() for module in model.modules()]
    try:
        for model in parts.components.values():
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training
