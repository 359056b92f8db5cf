"""All factors of all adapters in one buffer, their gradients in a second, and the same in the format of the products.

So an optimizer step, the norm of the gradient, setting it to zero, and handing it to other processes are one operation
each, not one for each of some hundred small tensors. The adapters' own parameters become views into the buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sdlora.adapters.lora import Lora

_ALIGN = 16
"""Every factor starts at a multiple of so many numbers: a cache line, and what vector units like."""


class FlatParameters:
    """The trainable numbers of a run.

    Args:
        adapters: component -> its adapters. Their parameters are replaced by views.
        dtype: number format of the products; for fp32 the values themselves serve.

    Attributes:
        values: fp32, (N,); zeros fill the gaps between factors, and stay zero.
        gradients: fp32, (N,).
        parts: component -> its stretch of `values`, a parameter whose `grad` is that of `gradients`; these are what an
            optimizer gets.
    """

    def __init__(self, adapters: Mapping[str, Iterable[Lora]], dtype: torch.dtype) -> None:
        groups = {component: list(several) for component, several in adapters.items()}
        everything = [adapter for several in groups.values() for adapter in several]
        total = sum(_room(p.numel()) for adapter in everything for p in (adapter.down, adapter.up))
        device = everything[0].down.device
        self.values = torch.zeros(total, device=device)
        self.gradients = torch.zeros(total, device=device)
        half = dtype != torch.float32
        self._working = torch.zeros(total, device=device, dtype=dtype) if half else None
        self._sums = torch.zeros(total, device=device, dtype=dtype) if half else self.gradients
        self.parts: dict[str, nn.Parameter] = {}
        at = 0
        for component, several in groups.items():
            start = at
            for adapter in several:
                at = self._take_in(adapter, at)
            self.parts[component] = _parameter(self.values[start:at], self.gradients[start:at])
        self.refresh()

    def _take_in(self, adapter: Lora, at: int) -> int:
        working, sums = [], []
        for name in ("down", "up"):
            old = getattr(adapter, name)
            view = self._view(self.values, at, old)
            view.copy_(old.detach())
            setattr(adapter, name, _parameter(view, self._view(self.gradients, at, old)))
            working.append(self._view(self.values if self._working is None else self._working, at, old))
            sums.append(self._view(self._sums, at, old))
            at += _room(old.numel())
        adapter.working = working[0], working[1]
        adapter.sums = sums[0], sums[1]
        return at

    @staticmethod
    def _view(buffer: Tensor, at: int, like: Tensor) -> Tensor:
        return buffer[at : at + like.numel()].view(like.shape)

    def refresh(self) -> None:
        """Brings the copies for the products up to date; due after every change of the values."""
        if self._working is not None:
            self._working.copy_(self.values)

    def collect(self) -> None:
        """Adds what a backward pass has left in the format of the products to `gradients`; due after every one."""
        if self._sums is not self.gradients:
            self.gradients += self._sums
            self._sums.zero_()

    def zero_gradients(self) -> None:
        """Sets all gradients to zero, in place."""
        self.gradients.zero_()


def _room(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def _parameter(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return parameter
