"""Frozen weights in fewer bits, turned into the number format of the products whenever one is computed.

Nothing trains in these bits: the input and its gradient pass through the restored weight in full precision, as in QLoRA
(Dettmers et al. 2023, arXiv:2305.14314), so the LoRA learns to live with the rounding of the base as well.

Legend: o outputs (the first side of a weight), N numbers of a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.frozen.layer import Frozen, freeze_layers, pull_conv

BLOCK = 64
"""Numbers that share a scale in nf4. Source: QLoRA, section 3."""

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The values that four bits stand for: quantiles of a normal distribution. Source: QLoRA, appendix E."""

Stored = tuple[Tensor, ...]
"""What is kept of a weight: its bits, and the scales where there are any."""


@dataclass(frozen=True)
class Format:
    """A way to store a frozen weight.

    Attributes:
        store: weight -> what is kept of it.
        restore: (what is kept, the weight's shape, number format) -> weight.
        size: (N, o) -> bytes that are kept.
    """

    store: Callable[[Tensor], Stored]
    restore: Callable[[Stored, torch.Size, torch.dtype], Tensor]
    size: Callable[[int, int], int]


def _scaled(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    # One kernel on a GPU: the product is taken in fp32 and rounded once, with no fp32 copy of the weight in between.
    return torch.mul(stored, scales, out=torch.empty(stored.shape, dtype=dtype, device=stored.device))


def _scales(rows: Tensor, largest: float) -> Tensor:
    return (rows.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _store_int8(weight: Tensor) -> Stored:
    rows = weight.detach().float().flatten(1)
    scales = _scales(rows, 127)
    return (rows / scales).round().to(torch.int8), scales


def _restore_int8(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return _scaled(stored[0], stored[1], dtype).view(shape)


def _store_fp8(weight: Tensor) -> Stored:
    rows = weight.detach().float().flatten(1)
    scales = _scales(rows, torch.finfo(torch.float8_e4m3fn).max)
    # As plain bytes: `module.to(dtype)` would cast numbers with a point.
    return (rows / scales).to(torch.float8_e4m3fn).view(torch.uint8), scales


def _restore_fp8(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return _scaled(stored[0].view(torch.float8_e4m3fn).to(dtype), stored[1], dtype).view(shape)


def _store_nf4(weight: Tensor) -> Stored:
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = _scales(blocks, 1)
    levels = torch.tensor(NF4_LEVELS, device=flat.device)
    codes = torch.bucketize(blocks / scales, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def _restore_nf4(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    levels = torch.tensor(NF4_LEVELS, device=stored[0].device, dtype=dtype)
    pairs = torch.cartesian_prod(levels, levels)  # what a byte stands for
    values = F.embedding(stored[0].int(), pairs).view(-1, BLOCK)
    return _scaled(values, stored[1], dtype).view(-1)[: shape.numel()].view(shape)


def _as_it_is(weight: Tensor) -> Stored:
    return (weight.detach(),)


def _cast(stored: Stored, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return stored[0].view(shape).to(dtype)


PLAIN = Format(_as_it_is, _cast, lambda numbers, outputs: 0)
"""The weight in its own number format, for what only moves it (`offloaded.py`)."""

FORMATS: dict[str, Format] = {
    "bf16": Format(lambda w: (w.detach().bfloat16(),), _cast, lambda numbers, outputs: 2 * numbers),
    "int8": Format(_store_int8, _restore_int8, lambda numbers, outputs: numbers + 4 * outputs),
    "fp8": Format(_store_fp8, _restore_fp8, lambda numbers, outputs: numbers + 4 * outputs),
    "nf4": Format(_store_nf4, _restore_nf4, lambda numbers, outputs: -(-numbers // BLOCK) * (BLOCK // 2 + 4)),
}
"""By name. int8 and fp8 (e4m3) have one scale per output, nf4 one per 64 numbers; scales are fp32."""


class Quantized(Frozen):
    """What the layers below share: stored tensors, and the weight that is made of them when it is asked for.

    Attributes:
        format: how the weight is stored.
        fetch: brings the stored tensors from elsewhere; `None` if they lie in the layer.
    """

    def _keep(self, layer: nn.Linear | nn.Conv2d, format: Format) -> None:
        self.bias = layer.bias
        self.fetch: Callable[[], Stored] | None = None
        self._shape, self._dtype = layer.weight.shape, layer.weight.dtype
        self._put(layer.weight, format)

    def _put(self, weight: Tensor, format: Format) -> None:
        self.format = format
        for i, tensor in enumerate(format.store(weight)):
            self.register_buffer(f"_stored{i}", tensor, persistent=False)

    def change(self, format: Format) -> bool:
        """Stores the weight, as it is by now, in another format; returns whether it is another, and it lies here."""
        if self.format is format or self.fetch:
            return False
        weight = self.weight
        self._buffers.clear()
        self._put(weight, format)
        return True

    @property
    def stored(self) -> Stored:
        """What is kept of the weight, on the device of the products."""
        return self.fetch() if self.fetch else tuple(self._buffers.values())  # type: ignore[arg-type]

    def give_away(self, fetch: Callable[[], Stored]) -> None:
        """Lets go of the stored tensors, which `fetch` brings from now on."""
        self._buffers.clear()
        self.fetch = fetch

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """The weight, restored; takes time and, while it is held, memory."""
        return nn.Parameter(self.format.restore(self.stored, self._shape, self._dtype), requires_grad=False)


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc]
    """A linear layer whose weight is stored in fewer bits.

    Args:
        layer: whose weight is stored; it is not changed.
        format: how.
    """

    kind = "Linear"

    def __init__(self, layer: nn.Linear, format: Format) -> None:
        self._shaped_as(layer)
        self._keep(layer, format)

    def product(self, x: Tensor) -> Tensor:
        """Returns x W^T + b, (..., in) -> (..., o)."""
        return F.linear(x, self.weight, self.bias)

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the gradient times W, (..., o) -> (..., in)."""
        return gradient @ self.weight


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[misc]
    """A convolution whose kernel is stored in fewer bits.

    Args:
        layer: whose weight is stored; it is not changed.
        format: how.
    """

    kind = "Conv2d"

    def __init__(self, layer: nn.Conv2d, format: Format) -> None:
        self._shaped_as(layer)
        self._keep(layer, format)

    def product(self, x: Tensor) -> Tensor:
        """Convolves, (B, in, h, w) -> (B, o, h', w')."""
        return self._conv_forward(x, self.weight, self.bias)

    def pull(self, gradient: Tensor, shape: torch.Size) -> Tensor:
        """Returns the input's gradient, (B, o, h', w') -> (B, in, h, w)."""
        return pull_conv(self, self.weight, gradient, shape)


def quantized(layer: nn.Module, format: Format) -> Quantized | None:
    """Returns a layer with its weight stored in a format, or `None` if there is no such layer for it."""
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(layer, format)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros":
        return QuantizedConv2d(layer, format)
    return None


def quantize(model: nn.Module, format: Format, skips: Callable[[str], bool]) -> list[str]:
    """Stores the weights of a model's frozen layers in a format, those inside adapters too.

    Layers that are stored in another one already, are brought from that to this one. One layer after the other, so
    there is never more than one weight in memory twice.

    Args:
        model: changed in place.
        format: an entry of `FORMATS`.
        skips: tells of a path whether that layer stays as it is.

    Returns:
        The paths of the layers that were changed.
    """
    changed = [
        path
        for path, module in model.named_modules()
        if isinstance(module, Quantized) and not skips(path) and module.change(format)
    ]
    return changed + freeze_layers(model, lambda path, layer: None if skips(path) else quantized(layer, format))
