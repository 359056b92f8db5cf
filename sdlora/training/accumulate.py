"""A step's batches, cut into slots, spread over processes, and added up again in one order.

A global batch holds the pictures of all processes. Its places are cut into slots of `micro_batch` pictures; a process
has the slots of its own places. Each slot's gradient is summed over the batches of a step, and then slots are summed in
their order, wherever they were computed. On a CPU the result is therefore the same to the last bit for every number of
processes. On GPUs, where sums are not made in a fixed order anyway, slots go straight into one buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdlora.data.dataset import Sample
from sdlora.training.world import World


@dataclass(frozen=True)
class Piece:
    """Pictures that are computed at once.

    Attributes:
        samples: which, B of them.
        positions: their numbers within the step, over all batches and processes.
    """

    samples: Sequence[Sample]
    positions: range


Slot = list[Piece]
"""The pieces of a step that lie at the same places in their batches; none of batches that are too short."""


def cut(batches: Sequence[Sequence[Sample]], *, share: int, rank: int, micro_batch: int) -> list[Slot]:
    """Returns the slots of a process.

    Args:
        batches: the global batches of a step; all pictures of one have the same size.
        share: places of a global batch that belong to each process.
        rank: number of the process.
        micro_batch: pictures in a slot, of each batch. Slots do not reach over the end of a share.
    """
    end = (rank + 1) * share
    places = [(start, min(start + micro_batch, end)) for start in range(rank * share, end, micro_batch)]
    return [_slot(batches, start, stop) for start, stop in places]


def _slot(batches: Sequence[Sequence[Sample]], start: int, stop: int) -> Slot:
    pieces, before = [], 0
    for batch in batches:
        if samples := batch[start:stop]:
            pieces.append(Piece(samples, range(before + start, before + start + len(samples))))
        before += len(batch)
    return pieces


def accumulate(
    slots: Sequence[Slot], compute: Callable[[Piece], Tensor], gradients: Tensor, world: World, stop: bool = False
) -> tuple[Tensor, Tensor]:
    """Sums a step's gradients over its pieces and over all processes.

    Args:
        slots: this process's part.
        compute: adds a piece's gradients into `gradients`, and returns its part of the step's loss, on their device.
        gradients: fp32, (N,), zeros at first; the step's gradients afterwards, the same in all processes.
        world: the processes.
        stop: whether this process was asked to stop.

    Returns:
        The step's loss, and how many processes were asked to stop: so all learn of it in the same step. Both lie on the
        device.
    """
    if gradients.device.type != "cpu" or (world.size == 1 and len(slots) == 1):
        tail = torch.zeros(2, device=gradients.device)
        tail[1].fill_(stop)
        for slot in slots:
            for piece in slot:
                tail[0] += compute(piece)
        if world.size > 1:
            world.sum(gradients, tail)
    else:
        total = world.sum_in_order(_rows(slots, compute, gradients, world, stop))
        gradients.copy_(total[:-2])
        tail = total[-2:].clone()
    return tail[0], tail[1]


def _rows(
    slots: Sequence[Slot], compute: Callable[[Piece], Tensor], gradients: Tensor, world: World, stop: bool
) -> list[Tensor]:
    """Returns a row of each slot: its gradients, its loss, and whether to stop, which the first one carries."""
    rows: list[Tensor] = []
    for number, slot in enumerate(slots):
        if number:
            gradients.zero_()
        loss = torch.zeros(())
        for piece in slot:
            loss += compute(piece)
        row = torch.cat([gradients, torch.stack([loss, torch.tensor(float(stop and not number))])])
        if rows and world.is_first:  # nothing is waited for here, so that two rows are enough
            rows[0].add_(row)
        else:
            rows.append(row)
    return rows
