"""A LoRA with fewer directions in each module: the best approximation of every change at its new rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sdlora.files.kohya import ModuleWeights
from sdlora.files.merge import whole
from sdlora.files.svd import Keep, Spectrum, of_product


@dataclass(frozen=True)
class Cut:
    """What became of one module.

    Attributes:
        before: its rank before, or how many directions its full change has at most.
        after: its rank now.
        total: squared Frobenius norm of the change before.
        carried: the same of what is kept of it.
    """

    before: int
    after: int
    total: float
    carried: float

    @property
    def kept(self) -> float:
        """Share of the change's Frobenius norm that is kept; 1 of nothing."""
        return math.sqrt(self.carried / self.total) if self.total else 1.0


@dataclass(frozen=True)
class Resized:
    """Modules, and what became of each.

    Attributes:
        modules: by name; those that lose nothing are the very ones given.
        cuts: by name.
    """

    modules: dict[str, ModuleWeights]
    cuts: dict[str, Cut]


def resize(modules: Mapping[str, ModuleWeights], keep: Keep, dtype: torch.dtype) -> Resized:
    """Cuts every module down to the rank that a rule says.

    A module that is cut gets its whole change into the factors, and its new rank as alpha. One of which nothing would
    be dropped stays as it is, bit for bit.

    Args:
        modules: weights by module name.
        keep: finds the new rank; see `sdlora.files.svd.RULES`.
        dtype: number format of the file to be.
    """
    resized, cuts = {}, {}
    for name, weights in modules.items():
        spectrum = of_product(weights.down, weights.up, weights.scale)
        rank = keep(spectrum.s, spectrum.total)
        dropped = rank < len(spectrum.s)
        resized[name] = module(spectrum, rank, weights.down.shape[1:], dtype) if dropped else weights
        after = rank if dropped else weights.rank
        cuts[name] = Cut(weights.rank, after, spectrum.total, spectrum.carried(rank) if dropped else spectrum.total)
    return Resized(resized, cuts)


def module(spectrum: Spectrum, rank: int, inputs: tuple[int, ...], dtype: torch.dtype) -> ModuleWeights:
    """Returns the best approximation of a change at a rank as a module.

    Args:
        spectrum: of the change.
        rank: at most as many directions as the spectrum holds.
        inputs: shape of the weight behind its first side: (in) or (in, kh, kw).
        dtype: number format of the file to be.
    """
    down, up = spectrum.factors(rank)
    ones = (1,) * (len(inputs) - 1)
    return whole(down.float().reshape(rank, *inputs), up.float().reshape(-1, rank, *ones), dtype)


def summary(cuts: Mapping[str, Cut]) -> str:
    """Says in one clause what was kept of a LoRA, and of its worst module."""
    total, carried = (sum(values) for values in zip(*((c.total, c.carried) for c in cuts.values()), strict=True))
    name, worst = min(cuts.items(), key=lambda item: item[1].kept)
    share = math.sqrt(carried / total) if total else 1.0
    return f"{share:.2%} of the change's Frobenius norm kept; least, {worst.kept:.2%}, of {name}"


def span(ranks: list[int]) -> str:
    """Says from where to where ranks go."""
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low} to {high}"
