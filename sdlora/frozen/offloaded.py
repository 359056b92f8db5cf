"""Frozen weights that wait in the CPU's memory and visit the device one block at a time.

A block is fetched when one of its layers is computed, on the way forward and again on the way back. While it is at work
the next one is already on its way: which that is, is remembered from the last time, so it does not matter in what order
a model's code calls its parts, nor that gradient checkpointing calls some of them twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sdlora.frozen.layer import freeze_layers
from sdlora.frozen.quantized import PLAIN, Quantized, Stored, quantized

_ALIGN = 64
"""Every tensor of a block starts at a multiple of so many bytes."""


class Block:
    """The stored tensors of some layers, in one stretch of the CPU's memory, so that they travel as one copy.

    Args:
        layers: whose tensors it takes over.
        pinned: whether the memory is locked, as copies beside the computation need.
    """

    def __init__(self, layers: list[Quantized], pinned: bool) -> None:
        self._places: list[list[tuple[int, Tensor]]] = []
        size = 0
        for layer in layers:
            places = []
            for tensor in layer.stored:
                places.append((size, tensor))
                size += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
            self._places.append(places)
        self.home = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for i, places in enumerate(self._places):
            for (_, tensor), view in zip(places, self.views(self.home, i), strict=True):
                view.copy_(tensor)
        # Only shape and format are needed from here on.
        self._places = [[(start, tensor.to("meta")) for start, tensor in places] for places in self._places]

    def views(self, stretch: Tensor, layer: int) -> Stored:
        """Returns the tensors of one layer within a copy of the block."""
        views = []
        for start, like in self._places[layer]:
            part = stretch[start : start + like.numel() * like.element_size()]
            views.append(part.view(like.dtype).view(like.shape))
        return tuple(views)


class Traffic:
    """Brings blocks to the device, and keeps two of them there at most: the one at work and the next.

    Args:
        blocks: all blocks.
        device: where products are computed; on a CPU the copies are made all the same, as tests want.

    Attributes:
        late: how often a block was not on its way yet when it was needed.
    """

    def __init__(self, blocks: list[Block], device: torch.device) -> None:
        self.blocks, self.device, self.late = blocks, device, 0
        self._aside = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._there: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        self._recent = (-1, -1)
        self._next: dict[tuple[int, int], int] = {}

    def fetch(self, number: int, layer: int) -> Stored:
        """Returns the stored tensors of one layer of a block, on the device."""
        if number != self._recent[1]:
            self._move_on(number)
        return self.blocks[number].views(self._there[number][0], layer)

    def _move_on(self, number: int) -> None:
        self._next[self._recent] = number
        self._recent = (self._recent[1], number)
        if number not in self._there:
            self.late += 1
            self._there = {}  # makes room first
            self._there[number] = self._bring(number)
        stretch, arrived = self._there[number]
        if arrived is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(arrived)
            stretch.record_stream(here)
        self._there = {number: self._there[number]}
        following = self._next.get(self._recent, number)
        if following != number:
            self._there[following] = self._bring(following)

    def _bring(self, number: int) -> tuple[Tensor, torch.cuda.Event | None]:
        home = self.blocks[number].home
        if self._aside is None:
            return home.to(self.device, copy=True), None
        with torch.cuda.stream(self._aside):
            stretch = home.to(self.device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._aside)
            return stretch, arrived


def offload(model: nn.Module, device: torch.device, block_of: Callable[[str], str | None]) -> Traffic:
    """Moves the weights of a model's frozen layers to the CPU, those inside adapters and quantised ones too.

    Biases, norms and adapters stay where they are. What a layer computes is the same bit for bit.

    Args:
        model: changed in place.
        device: where products are computed.
        block_of: tells of a layer's path in which block it is, or `None` to leave it on the device.
    """
    freeze_layers(model, lambda path, layer: quantized(layer, PLAIN) if block_of(path) else None)
    groups: dict[str, list[Quantized]] = {}
    for path, module in model.named_modules():
        block = block_of(path) if isinstance(module, Quantized) and module.fetch is None else None
        if block is not None:
            assert isinstance(module, Quantized)
            groups.setdefault(block, []).append(module)
    traffic = Traffic([], device)
    for number, layers in enumerate(groups.values()):
        traffic.blocks.append(Block(layers, pinned=device.type == "cuda"))
        for index, layer in enumerate(layers):
            layer.give_away(lambda n=number, i=index: traffic.fetch(n, i))
    return traffic
