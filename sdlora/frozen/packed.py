"""Frozen weights in the order that oneDNN multiplies them in, arranged once instead of twice at every step.

On a CPU each product of a plain layer first rearranges the weight, and where a picture is small next to the weight that
costs more than the product. A packed layer keeps two arranged copies, one for the way forward and a transposed one for
the way back.

Legend: B batch, i o inputs and outputs, h w sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdlora.frozen.layer import Frozen, pull_conv

_PLAIN = ("none", [], "")  # oneDNN could add an activation behind the product


class PackedLinear(Frozen, nn.Linear):
    """A linear layer with packed weights.

    Args:
        layer: whose weight is packed; the weight itself is kept, for what else asks for it.
    """

    kind = "Linear"

    def __init__(self, layer: nn.Linear) -> None:
        self._shaped_as(layer)
        self.weight, self.bias = layer.weight, layer.bias
        self._pair = _LinearPair(layer.weight)

    def product(self, x: Tensor) -> Tensor:
        """Returns x W^T + b, (..., i) -> (..., o)."""
        return self._pair.forward(x, self.bias)

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the gradient times W, (..., o) -> (..., i)."""
        return self._pair.back(gradient)


class PackedConv2d(Frozen, nn.Conv2d):
    """A convolution with packed weights.

    A 1 x 1 convolution is a linear layer over channels. The way back of a convolution that moves by one pixel is a
    convolution with the mirrored kernel; of any other it is left to torch. Packing waits for the first input, because
    oneDNN arranges by its size; other sizes are right too.

    Args:
        layer: whose weight is packed; the weight itself is kept, for what else asks for it.
    """

    kind = "Conv2d"

    def __init__(self, layer: nn.Conv2d) -> None:
        self._shaped_as(layer)
        self.weight, self.bias = layer.weight, layer.bias
        self._pair: Any = None

    def product(self, x: Tensor) -> Tensor:
        """Convolves, (B, i, h, w) -> (B, o, h', w')."""
        if self._pair is None:
            self._pair = self._pack(x)
        return self._pair.forward(x, self.bias)

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the input's gradient, (B, o, h', w') -> (B, i, h, w)."""
        back = self._pair.back(gradient)
        return pull_conv(self, self.weight, gradient, shape) if back is None else back

    def _pack(self, x: Tensor) -> Any:
        simple = self.stride == (1, 1) and self.padding == (0, 0)
        return _PointPair(self.weight) if simple and self.kernel_size == (1, 1) else _ConvPair(self, x)


class _LinearPair:
    """A matrix packed for both ways."""

    def __init__(self, weight: Tensor) -> None:
        weight = weight.detach()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._back = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous())

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, *_PLAIN)

    def back(self, gradient: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(gradient, self._back, None, *_PLAIN)


class _PointPair(_LinearPair):
    """A 1 x 1 kernel packed for both ways."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.flatten(1))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1), bias).permute(0, 3, 1, 2)

    def back(self, gradient: Tensor) -> Tensor:
        return super().back(gradient.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvPair:
    """A kernel packed for both ways, or for one if the other is no plain convolution."""

    def __init__(self, layer: nn.Conv2d, x: Tensor) -> None:
        weight = layer.weight.detach()
        padding: Any = layer.padding
        self._how = padding, layer.stride, layer.dilation, layer.groups
        self._weight = _pack_kernel(weight, *self._how, x.shape)
        mirrored = [d * (k - 1) - p for d, k, p in zip(layer.dilation, layer.kernel_size, padding, strict=True)]
        self._back_how = mirrored, (1, 1), layer.dilation, 1
        self._back = None
        if layer.stride == (1, 1) and layer.groups == 1 and min(mirrored) >= 0:
            turned = weight.flip(2, 3).transpose(0, 1).contiguous()
            self._back = _pack_kernel(turned, *self._back_how, (x.shape[0], turned.shape[1], *x.shape[2:]))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self._weight, bias, *self._how, *_PLAIN)

    def back(self, gradient: Tensor) -> Tensor | None:
        if self._back is None:
            return None
        return torch.ops.mkldnn._convolution_pointwise(gradient, self._back, None, *self._back_how, *_PLAIN)


def _pack_kernel(weight: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, shape: Any) -> Tensor:
    reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
    return reorder(weight.to_mkldnn(), padding, stride, dilation, groups, list(shape))
