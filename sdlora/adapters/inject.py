"""Finding layers in a model, putting adapters in their place, and taking them out again without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from sdlora.adapters.adapter import Adapter
from sdlora.frozen import Frozen

A = TypeVar("A", bound=Adapter)


@dataclass(frozen=True)
class Target:
    """A rule that selects layers.

    Attributes:
        under: class names; the layer must lie inside a module of one of them. Empty: anywhere.
        endings: the layer's path must end with one of these, on whole components (`to_q`, `to_out.0`). Empty: any.
        layers: class names of the layers themselves.
        kernels: which convolutions: "1x1", "kxk" or "any".
    """

    under: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    layers: tuple[str, ...] = ("Linear", "Conv2d", "Conv1D")
    kernels: str = "any"

    def selects(self, path: str, layer: nn.Module, ancestors: Sequence[str]) -> bool:
        """Tells whether the rule takes the layer at `path`, whose ancestors' class names are given."""
        kind = layer.kind if isinstance(layer, Frozen) else type(layer).__name__
        if kind not in self.layers:
            return False
        if self.under and not set(self.under) & set(ancestors):
            return False
        if self.endings and not any(path == e or path.endswith("." + e) for e in self.endings):
            return False
        if isinstance(layer, nn.Conv2d) and self.kernels != "any":
            return (tuple(layer.kernel_size) == (1, 1)) == (self.kernels == "1x1")
        return True


def find_layers(model: nn.Module, targets: Sequence[Target]) -> dict[str, nn.Module]:
    """Returns the layers, or the adapters already in their place, that any of the rules selects, by path.

    Raises:
        ValueError: if a rule selects nothing, so that a misspelt one cannot pass unnoticed.
    """
    found: dict[str, nn.Module] = {}
    hits = dict.fromkeys(targets, 0)
    for path, module, ancestors in _walk(model, "", ()):
        layer = module.layer if isinstance(module, Adapter) else module
        for target in targets:
            if target.selects(path, layer, ancestors):
                hits[target] += 1
                found[path] = module
    for target, count in hits.items():
        if not count:
            raise ValueError(f"{target} matches no layer of {type(model).__name__}")
    return found


def _walk(module: nn.Module, path: str, ancestors: tuple[str, ...]) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    inside = (*ancestors, type(module).__name__)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        yield child_path, child, inside
        if not isinstance(child, Adapter):
            yield from _walk(child, child_path, inside)


def inject(model: nn.Module, paths: Mapping[str, nn.Module], make: Callable[[str, nn.Module], A]) -> dict[str, A]:
    """Freezes the model and puts an adapter in the place of each of the given layers.

    Args:
        model: changed in place.
        paths: layers by path, as `find_layers` returns them.
        make: builds the adapter from a path and the layer, or adapter, found there.

    Returns:
        The adapters by path; their own parameters are the only ones that train.
    """
    model.requires_grad_(False)
    adapters = {path: make(path, layer) for path, layer in paths.items()}
    for path, adapter in adapters.items():
        adapter.train(model.training)
        _put(model, path, adapter)
    return adapters


def adapters_in(model: nn.Module) -> dict[str, Adapter]:
    """Returns the outermost adapters of a model by path."""
    return {path: module for path, module, _ in _walk(model, "", ()) if isinstance(module, Adapter)}


def eject(model: nn.Module) -> int:
    """Puts every replaced layer back, the very same objects; returns how many there were."""
    adapters = adapters_in(model)
    for path, adapter in adapters.items():
        _put(model, path, adapter.layer)
    return len(adapters)


def merge(model: nn.Module) -> int:
    """Adds every change to the weight beneath it and removes the adapters; returns how many there were."""
    adapters = adapters_in(model)
    for path, adapter in adapters.items():
        _put(model, path, adapter.merge())
    return len(adapters)


@contextmanager
def strength(adapters: Mapping[str, Adapter], value: float) -> Iterator[None]:
    """Sets the strength of the adapters for the time of a `with` block."""
    before = {path: adapter.strength for path, adapter in adapters.items()}
    try:
        for adapter in adapters.values():
            adapter.strength = value
        yield
    finally:
        for path, adapter in adapters.items():
            adapter.strength = before[path]


@contextmanager
def merged(model: nn.Module, room: int | None = None) -> Iterator[int]:
    """Puts every change into the weight beneath it for the time of a `with` block, so that it costs no time there.

    The adapters are out of the model meanwhile. A changed layer gets a second weight, the sum in fp32 rounded once to
    the weight's dtype; the first one is not written to, for it may be mapped from a file. Afterwards every adapter,
    layer and weight is the very same object in its place again, also after an error. Results differ from those with
    adapters by rounding.

    An adapter stays in its place if no room is left, or if its layer stores the weight so that nothing can be added to
    it: no floating point numbers, or a `can_merge` that is false.

    Args:
        model: changed in place.
        room: bytes that the second weights may take; `None` sets no limit. All together they are as large as the
            changed layers' weights: with LoRA in attention and feed-forward layers and two bytes a number, 0.5 GB for
            SD 1.5 and 4.4 GB for SDXL. Adapters of strength 0 need nothing.

    Yields:
        How many adapters are out.
    """
    out: list[tuple[str, Adapter, nn.Module, Tensor | None]] = []
    left = float("inf") if room is None else room
    try:
        for path, adapter in adapters_in(model).items():
            layer, weight = adapter.layer, None
            changes = [change for change in _stacked(adapter) if change.strength]
            if changes:
                if not getattr(layer, "can_merge", True):
                    continue
                weight = adapter.weight
                needed = weight.numel() * weight.element_size()
                if needed > left or not weight.is_floating_point():
                    continue
                left -= needed
            out.append((path, adapter, layer, weight))
            if weight is not None:
                layer.weight = nn.Parameter(_sum(weight, changes), requires_grad=False)
            _put(model, path, layer)
        yield len(out)
    finally:
        for path, adapter, layer, weight in out:
            if weight is not None:
                layer.weight = weight  # type: ignore[assignment]
            _put(model, path, adapter)


def _stacked(adapter: Adapter) -> Iterator[Adapter]:
    """Yields the adapters on one layer, the outermost first."""
    inner: nn.Module = adapter
    while isinstance(inner, Adapter):
        yield inner
        inner = inner.base


@torch.no_grad()
def _sum(weight: Tensor, changes: Sequence[Adapter]) -> Tensor:
    total = weight.float()
    for change in changes:
        total = total + change.strength * change.delta_weight().to(weight.device)
    return total.to(weight.dtype)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
