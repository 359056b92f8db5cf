"""A frozen layer is two products: of the input on the way forward, of the output's gradient on the way back.

`product` and `pull` do for a plain layer what the subclasses of `Frozen` do in their own ways: oneDNN's packed weights
(`packed.py`), weights of fewer bits (`quantized.py`), weights that wait in the CPU's memory (`offloaded.py`). Whoever
computes with a layer inside an `autograd.Function`, as LoRA does, needs no more than these two.

Legend: B batch, i o inputs and outputs, h w sizes; a linear layer takes (..., i), a convolution (B, i, h, w).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZES = {
    "Linear": ("in_features", "out_features"),
    "Conv2d": (
        *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
        *("transposed", "output_padding", "padding_mode"),
    ),
}
"""What says how large a layer is and how it computes, by kind."""


class Frozen(nn.Module):
    """Mixed into `nn.Linear` or `nn.Conv2d` by layers that store a weight in their own way.

    Subclasses implement `product` and `pull`; both are called without autograd.

    Attributes:
        can_merge: whether another `weight` changes what the layer computes.
        kind: name of the class that it stands for, Linear or Conv2d.
    """

    can_merge = False
    kind = ""

    def _shaped_as(self, layer: nn.Module) -> None:
        """Makes this an empty module with the sizes of a layer."""
        nn.Module.__init__(self)
        for name in _SIZES[self.kind]:
            setattr(self, name, getattr(layer, name))

    def product(self, x: Tensor) -> Tensor:
        """Returns the layer's output."""
        raise NotImplementedError

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the gradient of an input of the given shape, given the output's."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """Returns the layer's output; gradients flow to the input only."""
        if torch.is_grad_enabled() and input.requires_grad:
            return _Multiply.apply(input, self)  # type: ignore[no-any-return]
        return self.product(input)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Frozen) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pull(grad_outputs[0], ctx.shape), None


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns the output of a frozen layer, without autograd."""
    return layer.product(x) if isinstance(layer, Frozen) else layer(x)


def pull(layer: nn.Module, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Returns the gradient of a frozen layer's input, given that of its output, without autograd.

    Args:
        layer: Linear, Conv2d, transformers' Conv1D, or a `Frozen` one.
        gradient: of the output, in its shape.
        shape: of the input.

    Source: agrees with torch's autograd.
    """
    if isinstance(layer, Frozen):
        return layer.pull(gradient, shape)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.Linear):
        return gradient @ weight
    return pull_conv(layer, weight, gradient, shape) if isinstance(layer, nn.Conv2d) else F.linear(gradient, weight)


def pull_conv(layer: nn.Conv2d, weight: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Returns the gradient of a convolution's input for a given weight, (o, i, kh, kw)."""
    x = gradient.new_empty(shape)  # torch asks for it and reads no values
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0], 1, [True, False, False]
    )[0]


def freeze_layers(model: nn.Module, make: Callable[[str, nn.Module], nn.Module | None]) -> list[str]:
    """Replaces layers of a model, those inside adapters too; returns the paths of those that were.

    Args:
        model: changed in place.
        make: gets the path and a layer that is exactly `nn.Linear` or `nn.Conv2d`; returns what takes its place, or
            `None` to leave it.
    """
    replaced = []
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.Linear, nn.Conv2d):
                place = f"{path}.{name}" if path else name
                new = make(place, child)
                if new is not None:
                    setattr(module, name, new)
                    replaced.append(place)
    return replaced
