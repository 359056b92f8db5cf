"""LoRA for Linear, Conv2d (1 x 1 and k x k) and transformers' Conv1D: W' = W + (alpha / rank) * B A.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. The convolution's factors have kohya's shapes (LoCon), so that
they go into a file unchanged: down [rank, in, kh, kw] carries the kernel, up is [out, rank, 1, 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdlora.adapters.adapter import Adapter
from sdlora.frozen import product, pull

_Pair = tuple[Tensor, ...]
"""Something of down, and the same of up."""


def factor_shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of the two factors, (down, up), for a layer.

    Raises:
        TypeError: for a layer that has no LoRA form here.
    """
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise TypeError(f"LoRA for grouped or specially padded convolutions is not supported: {layer}")
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    if _is_conv1d(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        inputs, outputs = weight.shape
        return (rank, inputs), (outputs, rank)
    raise TypeError(f"LoRA takes Linear, Conv2d or transformers' Conv1D, got {type(layer).__name__}")


def _is_conv1d(layer: nn.Module) -> bool:
    # GPT-2's linear layer, which stores its weight transposed. Told by its name, for transformers is not imported here.
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


class Lora(Adapter):
    """The low-rank change of one layer.

    `down` (A in the paper) starts as Kaiming-uniform noise and `up` (B) as zeros, so that the change starts as exactly
    nothing. Both are fp32 whatever the dtype of the base: updates of 1e-4 vanish in the 8 bits of a bf16 mantissa.

    Attributes:
        rank: inner width of the factors.
        alpha: the change is scaled by alpha / rank.
        dropout: share of the inputs hidden from the change while training.
        working: down and up in the number format of the products, kept by `FlatParameters`, or `None`.
        sums: where the gradients of down and up are added to, kept by `FlatParameters`; `None` hands them to autograd.

    Args:
        base: the layer to change.
        rank: inner width of the factors, at least 1.
        alpha: the change is scaled by alpha / rank; `None` means the rank.
        dropout: share of the inputs hidden from the change while training, [0, 1).
        generator: source of the start values; `None` takes torch's global one.

    Raises:
        TypeError: for a layer that has no LoRA form here.
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Source: initialisation as loralib's `reset_parameters` (a = sqrt(5)).
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(base)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        down, up = factor_shapes(self.layer, rank)
        device = self.weight.device
        start = torch.empty(down)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(start.to(device))
        self.up = nn.Parameter(torch.zeros(up, device=device))
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = dropout
        self._convolves = isinstance(self.layer, nn.Conv2d)
        self.working: tuple[Tensor, Tensor] | None = None
        self.sums: tuple[Tensor, Tensor] | None = None

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Computes base(x) + strength * (alpha / rank) * up(down(dropout(x))), in the base's output dtype.

        While training, the change is computed in the dtype of x, else in fp32.
        """
        if self.strength == 0:
            return self.base(x)
        if self.training and torch.is_grad_enabled() and not self.dropout and not isinstance(self.base, Adapter):
            return LowRank.apply(x, self.down, self.up, self)  # type: ignore[no-any-return]
        y = self.base(x)
        dtype = x.dtype if self.training else self.down.dtype
        down, up = self.down.to(dtype), self.up.to(dtype)  # by autograd, unlike `working`
        x = F.dropout(x.to(dtype), self.dropout, self.training)
        change = F.conv2d(self._hidden(x, down), up) if self._convolves else F.linear(F.linear(x, down), up)
        return y + (change * self.factor).to(y.dtype)

    @property
    def factor(self) -> float:
        """What the product of the factors is multiplied with: strength * alpha / rank."""
        return self.strength * self.alpha / self.rank

    def factors(self, dtype: torch.dtype) -> _Pair:
        """Returns down and up in a number format; those kept in `working` where they have it."""
        if self.working is not None and self.working[0].dtype == dtype:
            return self.working
        return self.down.to(dtype), self.up.to(dtype)

    def _hidden(self, x: Tensor, down: Tensor) -> Tensor:
        layer: Any = self.layer
        return F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation)

    def delta_weight(self) -> Tensor:
        """Returns (alpha / rank) * up down: fp32, in the weight's own shape."""
        product = self.up.detach().float().flatten(1) @ self.down.detach().float().flatten(1)
        if _is_conv1d(self.layer):
            product = product.T
        return (product * self.scale).reshape(self.weight.shape)

    def extra_repr(self) -> str:
        """Shows rank and alpha in `print(model)`."""
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"


class LowRank(torch.autograd.Function):
    """A frozen layer and its low-rank change in one node: eleven operations where autograd would take some forty.

    The change is added into the layer's output in place, and its part of the input's gradient likewise. Of the factors'
    products only the one of width `rank` is kept for the way back. alpha / rank rides on the products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, lora: Lora) -> Tensor:
        """Returns base(x) + factor * up(down(x))."""
        y = product(lora.base, x)
        down, up = lora.factors(x.dtype)
        if lora._convolves:
            hidden = lora._hidden(x, down)
            y.add_(F.conv2d(hidden, up), alpha=lora.factor)
        else:
            hidden = _rows(x).mm(down.t())
            _rows(y).addmm_(hidden, up.t(), alpha=lora.factor)
        ctx.save_for_backward(x, hidden)
        ctx.lora = lora
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        """Returns the gradients of x and, unless they are summed in place, of down and up."""
        x, hidden = ctx.saved_tensors
        lora: Lora = ctx.lora
        (gradient,) = grad_outputs
        gx = pull(lora.base, gradient, x.shape) if ctx.needs_input_grad[0] else None
        factors = lora.factors(x.dtype)
        sums = lora.sums or tuple(torch.zeros_like(factor) for factor in factors)
        back = _conv_back if lora._convolves else _linear_back
        back(lora, factors, sums, gradient, x, hidden, gx)
        if lora.sums is not None:
            return gx, None, None, None
        return gx, sums[0].to(lora.down.dtype), sums[1].to(lora.up.dtype), None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _linear_back(
    lora: Lora, factors: _Pair, sums: _Pair, gradient: Tensor, x: Tensor, hidden: Tensor, gx: Tensor | None
) -> None:
    """Adds the change's part to the gradients of x, down and up."""
    down, up = factors
    factor = lora.factor
    gradient = _rows(gradient)
    of_hidden = gradient.mm(up)
    if gx is not None:
        _rows(gx).addmm_(of_hidden, down, alpha=factor)
    sums[0].addmm_(of_hidden.t(), _rows(x), alpha=factor)
    sums[1].addmm_(gradient.t(), hidden, alpha=factor)


def _conv_back(
    lora: Lora, factors: _Pair, sums: _Pair, gradient: Tensor, x: Tensor, hidden: Tensor, gx: Tensor | None
) -> None:
    """Adds the change's part to the gradients of x, down and up."""
    down, up = factors
    layer: Any = lora.layer
    of_hidden, of_up, _ = torch.ops.aten.convolution_backward(
        gradient, hidden, up, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    how = layer.stride, layer.padding, layer.dilation, False, [0, 0], 1
    to_x, of_down, _ = torch.ops.aten.convolution_backward(
        of_hidden, x, down, None, *how, [gx is not None, True, False]
    )
    if gx is not None:
        gx.add_(to_x, alpha=lora.factor)
    sums[0].add_(of_down, alpha=lora.factor)
    sums[1].add_(of_up, alpha=lora.factor)
