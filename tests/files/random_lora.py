"""LoRA files with random values for any layers of any base."""

from collections.abc import Iterable
from pathlib import Path

import torch

from sdlora.diffusion.noise import generator
from sdlora.families.places import places
from sdlora.files.kohya import LoraFile, ModuleWeights, read_lora, write_modules


def random_module(name: str, shape: tuple[int, ...], rank: int, alpha: float, size: float, seed: int) -> ModuleWeights:
    """Returns a module for a weight of some shape."""
    rng = generator("lora", name, seed)
    ones = (1,) * (len(shape) - 2)
    down = torch.randn(rank, *shape[1:], generator=rng) * size
    return ModuleWeights(down, torch.randn(shape[0], rank, *ones, generator=rng) * size, alpha)


def random_lora(
    path: Path,
    base: Path,
    names: Iterable[str] | None = None,
    *,
    rank: int = 3,
    alpha: float = 1.5,
    size: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **metadata: str,
) -> LoraFile:
    """Writes a LoRA for some layers of a base, by default all, and reads it back."""
    _, table = places(base)
    modules = {}
    for name in table if names is None else names:
        shape = table[name].shape[::-1] if table[name].transposed else table[name].shape
        modules[name] = random_module(name, shape, rank, alpha, size, seed)
    write_modules(path, modules, metadata, dtype)
    return read_lora(path)


def delta(weights: ModuleWeights) -> torch.Tensor:
    """Returns a module's change, (out, in * kh * kw), in fp64."""
    return weights.scale * weights.up.double().flatten(1) @ weights.down.double().flatten(1)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the norm of a difference as a share of the expected norm."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
