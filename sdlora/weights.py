"""Weights on their way from a file into a module: read once, each by itself, straight into the format and place wanted.

A module is built without memory first, so nothing is drawn at random only to be overwritten. It remembers where its
weights came from, so that their hash can be looked up instead of being computed at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdlora.container import Container
from sdlora.errors import ModelError


@dataclass(frozen=True)
class Weight:
    """One weight of a module in a file.

    Attributes:
        container: the file.
        key: its key there.
        third: which third of the rows under that key it is, 0 to 2; `None`: all of them.
        transposed: whether it lies there the other way round.
    """

    container: Container
    key: str
    third: int | None = None
    transposed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Number format in the file."""
        return self.container.entries[self.key].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As the module has it, up to sides of 1."""
        shape = self.container.entries[self.key].shape
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def view(self) -> Tensor:
        """Returns it as it lies in the file; see `Container.view`."""
        whole = self.container.view(self.key)
        part = whole if self.third is None else whole.chunk(3)[self.third]
        return part.T if self.transposed else part

    def load(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Returns a copy on a device, in a number format."""
        if device.type == "cpu" and dtype == self.dtype and self.third is None and not self.transposed:
            return self.container.read(self.key)  # faster than a copy of what is mapped, page by page
        # Onto the device first: it casts faster than the processor.
        return self.view().to(device).to(dtype, copy=device.type == "cpu").contiguous()


def assemble(
    build: Callable[[], nn.Module],
    weight: Callable[[str], Weight],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Builds a module and gives it its weights; returns it in evaluation mode.

    Args:
        build: makes the module; called where parameters take no memory.
        weight: name of a weight in the module -> where it lies; raises where it lies nowhere.
        source: file or folder that the weights come from, for messages.
        device: where the module shall be.
        dtype: in which number format.

    Raises:
        ModelError: if the module cannot be built, or a weight is missing, of another shape, or no number with a point.
    """
    device = torch.device(device)
    try:
        with init_empty_weights(include_buffers=False), _Unset():
            module = build()
    except Exception as error:  # the libraries raise many kinds
        raise ModelError(f"{source} is damaged: its widths do not go together") from error
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    weights = {name: weight(name) for name in shapes}
    for name, found in weights.items():
        _require_fit(found, shapes[name])
    loaded: dict[str, Tensor] = {}
    for name in sorted(weights, key=lambda name: _place(weights[name])):  # from the front of the file to its end
        loaded[name] = weights[name].load(device, dtype).reshape(shapes[name])
    module.load_state_dict(loaded, assign=True)
    module.to(device)  # buffers that no file holds
    _ORIGINS[module] = Origin(weights, shapes, _state(module))
    _ORIGINS[module].unmap()
    return module.eval()


class _Unset(TorchFunctionMode):
    """Leaves out what draws start values for parameters without memory, which takes torch longer than for real ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        name = func.__name__
        writes = name.endswith("_") and not name.startswith("__") and name != "requires_grad_"
        return tensor if writes and isinstance(tensor, Tensor) and tensor.is_meta else func(*args, **kwargs)


@dataclass(frozen=True)
class Origin:
    """Where the weights of a module came from.

    Attributes:
        weights: by name.
        shapes: as the module has them.
        state: of the module's memory when they had just been loaded.
    """

    weights: Mapping[str, Weight]
    shapes: Mapping[str, tuple[int, ...]]
    state: tuple[Any, ...]

    @property
    def containers(self) -> list[Container]:
        """The files, sorted by path."""
        found = {weight.container.path: weight.container for weight in self.weights.values()}
        return [found[path] for path in sorted(found)]

    def stored(self) -> dict[str, Tensor]:
        """Returns the weights as they lie in the files, by name; see `Container.view`."""
        return {name: weight.view().reshape(self.shapes[name]) for name, weight in self.weights.items()}

    def unmap(self) -> None:
        """Lets go of the files."""
        for container in self.containers:
            container.unmap()


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def origin(module: nn.Module) -> Origin | None:
    """Returns where the weights of a module came from, or `None` if that is not known or they were changed since."""
    known = _ORIGINS.get(module)
    return known if known and known.state == _state(module) else None


def moved(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Moves a module as `Module.to` does; what came from a file counts as unchanged."""
    known = origin(module)
    nn.Module.to(module, device, dtype)  # that of diffusers warns of modules to be kept in fp32, and then names none
    if known:
        _ORIGINS[module] = Origin(known.weights, known.shapes, _state(module))
    return module


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Returns what is different after a weight was replaced or written to: its place in memory, its write counter."""
    return tuple((name, value.data_ptr(), value._version) for name, value in module.state_dict(keep_vars=True).items())


def _place(weight: Weight) -> tuple[str, int]:
    return str(weight.container.path), weight.container.entries[weight.key].start


def _require_fit(weight: Weight, shape: tuple[int, ...]) -> None:
    """Checks a weight's shape, in which a linear layer is as good as a convolution of one pixel."""
    file, key, stored = weight.container.path, weight.key, weight.shape
    if _without_ones(stored) != _without_ones(shape):
        raise ModelError(f"{file} is damaged or of an unknown structure: {key} is {stored}, and {shape} is expected")
    if not weight.dtype.is_floating_point:
        raise ModelError(f"{file} holds {key} as {weight.dtype}; give the checkpoint in fp16, bf16 or fp32")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape
