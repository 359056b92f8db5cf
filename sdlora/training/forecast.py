"""How much memory a run will take, before it takes it: weights are counted, activations are measured without memory.

The denoiser is built a second time on torch's meta device, where tensors have shapes and no values, and one picture
passes it. What autograd would keep of that for the way back is added up: in all, within each block that checkpointing
can compute again, and at the blocks' entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.adapters import Lora, inject
from sdlora.attention.processor import attend_with
from sdlora.families import Conditioning, Parts
from sdlora.families.folders import quiet
from sdlora.frozen.quantized import FORMATS
from sdlora.training.savings import Rung, block_of, held, layers_of

WORKING = 6
"""Tensors of the largest size that are in use at once beside what is kept: gradients, and what kernels put aside.

Source: measured, see docs/memory.md.
"""
OVERHEAD = {"cuda": 300_000_000}
"""Bytes for libraries' workspaces and what an allocator cannot use."""

_BLOCKS = {"BasicTransformerBlock": ("attention", "all"), "ResnetBlock2D": ("all",)}
"""Blocks that are computed again, by the levels of checkpointing at which they are."""


@dataclass
class Activations:
    """What is kept of one picture for the way back, in bytes.

    Attributes:
        kept: by level of checkpointing, between the way forward and back.
        again: by level, the most that a block needs while it is computed again.
        largest: the largest single tensor.
    """

    kept: dict[str, int] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)
    largest: int = 0


@dataclass(frozen=True)
class Forecast:
    """What a run takes, by rung.

    Attributes:
        weights: bytes of the denoiser's weights by number format, `auto` among them.
        blocks: the two largest blocks of the denoiser together, by number format; what is on the device at a time when
            weights are offloaded.
        kept_weights: bytes of those weights that no rung makes smaller.
        largest_weight: bytes of the largest weight when it is restored.
        fixed: adapters, gradients, moments, whatever else stays on the device.
        activations: of one picture.
        factor: measured bytes over forecast ones, for activations; 1 until a step was measured.
    """

    weights: Mapping[str, int]
    blocks: Mapping[str, int]
    kept_weights: int
    largest_weight: int
    fixed: int
    activations: Activations
    factor: float = 1.0

    def total(self, rung: Rung) -> int:
        """Returns the bytes at the highest point of a step."""
        return round(self.resting(rung) + self.factor * self.working(rung))

    def resting(self, rung: Rung) -> int:
        """Returns the bytes between steps: weights and what is fixed."""
        weights = self.blocks[rung.base_dtype] if rung.offload else self.weights[rung.base_dtype]
        return self.kept_weights + weights + self.fixed

    def working(self, rung: Rung) -> int:
        """Returns the bytes that come and go within a step."""
        a = self.activations
        pictures = a.kept[rung.checkpointing] + a.again[rung.checkpointing] + WORKING * a.largest
        restored = 0 if rung.base_dtype == "auto" else 2 * self.largest_weight
        return rung.micro_batch * pictures + restored

    def corrected(self, rung: Rung, measured: int) -> Forecast:
        """Returns the forecast that would have said what was measured at the highest point of a step on a rung."""
        return replace(self, factor=max(0.1, (measured - self.resting(rung)) / self.working(rung)))


def forecast(
    parts: Parts, adapters: Mapping[str, Lora], size: tuple[int, int], conditioning: Conditioning, fixed: int
) -> Forecast:
    """Foresees the memory of a run.

    Args:
        parts: the base, its weights not yet quantised or offloaded.
        adapters: those of the denoiser, by path.
        size: width and height in pixels of the largest pictures.
        conditioning: of one picture, a batch of one.
        fixed: bytes that stay on the device whatever is done to the denoiser.
    """
    layers = layers_of(parts.denoiser)
    weights, blocks = {}, {}
    for name, form in FORMATS.items():
        sizes = {path: form.size(x.weight.numel(), x.weight.shape[0]) for path, x in layers.items()}
        weights[name], blocks[name] = sum(sizes.values()), _two_largest(sizes)
    sizes = {path: held(layer) for path, layer in layers.items()}
    weights["auto"], blocks["auto"] = sum(sizes.values()), _two_largest(sizes)
    own = {id(p) for a in adapters.values() for p in (a.down, a.up)}
    everything = sum(p.numel() * p.element_size() for p in parts.denoiser.parameters() if id(p) not in own)
    return Forecast(
        weights=weights,
        blocks=blocks,
        kept_weights=everything - weights["auto"],
        largest_weight=max(sizes.values()),
        fixed=fixed + OVERHEAD.get(parts.device.type, 0),
        activations=measure_activations(parts, adapters, size, conditioning),
    )


def _two_largest(sizes: Mapping[str, int]) -> int:
    blocks: dict[str | None, int] = {}
    for path, size in sizes.items():
        blocks[block_of(path)] = blocks.get(block_of(path), 0) + size
    return sum(sorted(blocks.values())[-2:])


def measure_activations(
    parts: Parts, adapters: Mapping[str, Lora], size: tuple[int, int], conditioning: Conditioning
) -> Activations:
    """Counts what one picture leaves for the way back, on the meta device; takes no memory and some seconds at most.

    Args:
        parts: the base.
        adapters: those of the denoiser, by path.
        size: width and height of the picture in pixels.
        conditioning: a batch of one.
    """
    denoiser: Any = parts.denoiser
    with torch.device("meta"), quiet():
        model = type(denoiser).from_config(denoiser.config).to(parts.dtype)
        attend_with(_attend, model)
        layers = {path: model.get_submodule(path) for path in adapters}
        for lora in inject(model, layers, lambda path, layer: Lora(layer, adapters[path].rank)).values():
            lora.working = lora.down.to(parts.dtype), lora.up.to(parts.dtype)
        width, height = (side // parts.vae_factor for side in size)
        noisy = torch.empty(1, denoiser.config.in_channels, height, width, dtype=parts.dtype)
        told = {name: torch.empty_like(x, device="meta") for name, x in conditioning.items()}
        with _counting(model.train()) as found:
            parts.family.denoise(replace(parts, denoiser=model), noisy, torch.zeros(1, dtype=torch.int64), told)
    return found


class _Attention(torch.autograd.Function):
    """Leaves for the way back what fused attention kernels leave: inputs, output and a row's logarithmic sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _Attention.apply(query, key, value)  # type: ignore[no-any-return]


@contextmanager
def _counting(model: nn.Module) -> Any:
    """Yields activations whose numbers stand when the block ends, after one pass through the model."""
    found, seen = Activations(), {_storage(p): 0 for p in model.parameters()}
    alive: list[Any] = []
    within: dict[str, list[tuple[int, int]]] = {"none": [], "attention": [], "all": []}
    total = [0]

    def count(x: Tensor) -> Tensor:
        if _storage(x) not in seen:
            alive.append(x.untyped_storage())  # or its place would be given to another
            seen[_storage(x)] = x.untyped_storage().nbytes()
            total[0] += seen[_storage(x)]
            found.largest = max(found.largest, seen[_storage(x)])
        return x

    starts: list[int] = []

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        starts.append(total[0])

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        kept = total[0] - starts.pop()
        entry = inputs[0].numel() * inputs[0].element_size()
        for level in _BLOCKS[type(module).__name__]:
            within[level].append((kept, entry))

    hooks = []
    for module in model.modules():
        if type(module).__name__ in _BLOCKS:
            hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        yield found
    for hook in hooks:
        hook.remove()
    for level, blocks in within.items():
        found.kept[level] = total[0] - sum(max(0, kept - entry) for kept, entry in blocks)
        found.again[level] = max((kept for kept, _ in blocks), default=0)


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
