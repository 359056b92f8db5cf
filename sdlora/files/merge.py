"""Several LoRAs into one that does what they do together: their factors side by side.

U1 D1 + U2 D2 = [U1 U2] [D1; D2], so nothing is lost, and the ranks add up. A smaller rank is cut from that sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.errors import LoraFileError
from sdlora.files.attach import looks_like, squeezed
from sdlora.files.canonical import NAMES, both_spellings
from sdlora.files.kohya import LoraFile, ModuleWeights
from sdlora.files.webui import printable

_EITHER = "Stable Diffusion 1.x or 2.x"


@dataclass(frozen=True)
class Weighed:
    """A LoRA and the strength that it shall act with."""

    lora: LoraFile
    strength: float = 1.0

    def factor(self, name: str) -> float:
        """Returns the factor on the product of a module's factors."""
        return self.strength * self.lora.modules[name].scale


def merge(sources: Sequence[Weighed], dtype: torch.dtype) -> dict[str, ModuleWeights]:
    """Returns the modules of one LoRA that at strength 1 does what the sources do together.

    A module's rank is the sum of its ranks in the sources, and its alpha is that rank; one that a single source has
    stays alone.

    Args:
        sources: at least one.
        dtype: number format of the file to be, for alpha must be exact in it.

    Raises:
        LoraFileError: if the sources were made for different models, or a strength is 0.
    """
    require_weighty(sources)
    _require_alike(sources)
    shared: dict[str, list[Weighed]] = {}
    for source in sources:
        for name in source.lora.modules:
            shared.setdefault(name, []).append(source)
    return {name: _merged(name, having, dtype) for name, having in shared.items()}


def require_weighty(sources: Sequence[Weighed]) -> None:
    """Checks that every strength has an effect.

    Raises:
        LoraFileError: if one is 0.
    """
    for source in sources:
        if source.strength == 0:
            raise LoraFileError(f"{source.lora.path} at strength 0 adds nothing; leave it out, or raise its strength")


def _require_alike(sources: Sequence[Weighed]) -> None:
    kinds = {_kind(source.lora): source.lora.path for source in reversed(sources)}
    kinds.pop("unknown", None)
    if "sdxl" not in kinds:
        kinds.pop(_EITHER, None)
    if len(kinds) > 1:
        told = ", ".join(f"{path} for {NAMES.get(kind, kind)}" for kind, path in reversed(kinds.items()))
        raise LoraFileError(f"these LoRAs were made for different models: {told}; merge LoRAs of one base model")
    if both := both_spellings(name for source in sources for name in source.lora.modules):
        raise LoraFileError(
            f"these LoRAs name the denoiser's layers in two ways ({', '.join(map(printable, both))}), and do not tell "
            "what they were made for; merge LoRAs of one base model"
        )


def _kind(lora: LoraFile) -> str:
    kind = looks_like(lora)
    old = any(name.startswith("lora_te_") for name in lora.modules)  # SDXL has lora_te1_ and lora_te2_
    return _EITHER if kind == "unknown" and old else kind


def _merged(name: str, sources: Sequence[Weighed], dtype: torch.dtype) -> ModuleWeights:
    first = sources[0].lora.modules[name]
    pairs = []
    for source in sources:
        weights = source.lora.modules[name]
        if squeezed(weights.shape) != squeezed(first.shape):
            raise LoraFileError(
                f"{printable(name)} changes a weight of shape {list(squeezed(first.shape))} in {sources[0].lora.path} "
                f"and of {list(squeezed(weights.shape))} in {source.lora.path}; they were made for different models"
            )
        down, up = folded(weights.down, weights.up, source.factor(name))
        pairs.append((down.reshape(-1, *first.down.shape[1:]), up.reshape(*up.shape[:2], *first.up.shape[2:])))
    return whole(torch.cat([down for down, _ in pairs]), torch.cat([up for _, up in pairs], dim=1), dtype)


def folded(down: Tensor, up: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Returns factors, in fp32, whose product is `factor` times the product of the given ones.

    `down` is scaled by a power of two, which rounds nothing, such that both become about equally large; `up` gets the
    rest. So a scale of 1/128, which is common, drives neither below what fp16 holds.
    """
    down, up = down.float(), up.float()
    if factor == 1:
        return down, up
    sizes = [torch.linalg.vector_norm(t).item() / math.sqrt(t.numel()) for t in (up, down)]
    ratio = abs(factor) * sizes[0] / sizes[1] if all(sizes) else 0.0
    shift = 2.0 ** round(math.log2(ratio) / 2) if 0 < ratio < math.inf else 1.0
    return down * shift, (up.double() * (factor / shift)).float()


def whole(down: Tensor, up: Tensor, dtype: torch.dtype) -> ModuleWeights:
    """Returns factors whose product is the whole change as a module: its alpha is its rank.

    bf16 does not hold every rank above 256; then alpha is the nearest number that it holds, and `up` makes up for it.
    """
    rank = float(down.shape[0])
    alpha = torch.tensor(rank).to(dtype).item()
    return ModuleWeights(down, up if alpha == rank else up * (rank / alpha), alpha)


def common_dtype(sources: Sequence[LoraFile]) -> torch.dtype:
    """Returns the smallest number format that LoRA files are written in and that holds all sources' values."""
    dtype = sources[0].dtype
    for source in sources:
        for weights in source.modules.values():
            dtype = torch.promote_types(dtype, torch.promote_types(weights.down.dtype, weights.up.dtype))
    return torch.float32 if dtype == torch.float64 else dtype
