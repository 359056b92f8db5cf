"""Many tensors of few shapes, those of one shape in one tensor: a batch is a choice of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

Named = dict[str, Tensor]
"""The tensors of one sample, by name."""


class Stacks:
    """Tensors of many samples, on one device; the values are those that were given, bit for bit.

    Args:
        samples: per example and variant, its tensors. Those of all samples have the same names.
        device: where they shall lie.
        pin: whether to pin them in the processor's memory, from which a GPU copies without waiting.
    """

    def __init__(self, samples: Sequence[Sequence[Named]], device: torch.device, pin: bool = False) -> None:
        members: dict[tuple[torch.Size, ...], dict[int, Named]] = {}
        for each in samples:
            for one in each:  # several examples may share one object
                members.setdefault(tuple(tensor.shape for tensor in one.values()), {})[id(one)] = one
        self._tensors: list[Named] = []
        places: dict[int, tuple[int, int]] = {}
        for number, group in enumerate(members.values()):
            self._tensors.append(_stacked(list(group.values()), device, pin))
            places |= {name: (number, row) for row, name in enumerate(group)}
        self._places = [[places[id(one)] for one in each] for each in samples]
        self._device = device

    def rows(self, chosen: Sequence[tuple[int, int]]) -> Named:
        """Returns the tensors of B samples of one shape, each with B in front, on the device.

        Args:
            chosen: (example, variant) of each.
        """
        places = [self._places[example][variant] for example, variant in chosen]
        # Such a small copy is taken over by the driver at once, so it may be forgotten here and is not waited for.
        index = torch.tensor([row for _, row in places]).to(self._device, non_blocking=True)
        return {name: tensor.index_select(0, index) for name, tensor in self._tensors[places[0][0]].items()}

    def views(self) -> list[list[Named]]:
        """Returns the samples in the order in which they were given, as views."""
        return [
            [{name: tensor[row] for name, tensor in self._tensors[number].items()} for number, row in each]
            for each in self._places
        ]


def _stacked(group: list[Named], device: torch.device, pin: bool) -> Named:
    stacked = {}
    for name in group[0]:
        tensor = torch.stack([one[name] for one in group])
        if pin:
            with suppress(RuntimeError):  # the system lends only so much; without, copies are slower
                tensor = tensor.pin_memory()
        stacked[name] = tensor.to(device)
    return stacked
