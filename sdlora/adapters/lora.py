"""LoRA for Linear, Conv2d (1 x 1 and k x k) and transformers' Conv1D: W' = W + (alpha / rank) * B A.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1. The convolution's factors have kohya's shapes (LoCon), so that
they go into a file unchanged: down [rank, in, kh, kw] carries the kernel, up is [out, rank, 1, 1].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.adapters.adapter import Adapter


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
        self.alpha = float(rank if alpha is None else alpha)
        self.dropout = dropout

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """Computes base(x) + strength * (alpha / rank) * up(down(dropout(x))), in the base's output dtype."""
        y = self.base(x)
        if self.strength == 0:
            return y
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.dtype)
        x = F.dropout(x, self.dropout, self.training)
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation)
            change = F.conv2d(self._scaled(hidden), self.up)
        else:
            change = F.linear(self._scaled(F.linear(x, self.down)), self.up)
        return y + change.to(y.dtype)

    def _scaled(self, hidden: Tensor) -> Tensor:
        # Between the factors, where it is `rank` wide, and not at all for 1: a step of nano takes 0.96 of the time it
        # takes with the scale on the output (median of 25 pairs, one thread, rank 16, batch 4).
        factor = self.strength * self.scale
        return hidden if factor == 1 else hidden * factor

    def delta_weight(self) -> Tensor:
        """Returns (alpha / rank) * up down: fp32, in the weight's own shape."""
        product = self.up.detach().float().flatten(1) @ self.down.detach().float().flatten(1)
        if _is_conv1d(self.layer):
            product = product.T
        return (product * self.scale).reshape(self.weight.shape)

    def extra_repr(self) -> str:
        """Shows rank and alpha in `print(model)`."""
        return f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
