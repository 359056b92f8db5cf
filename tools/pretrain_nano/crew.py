"""Several CPU processes that share each batch: one thread each, the weights and gradients in shared memory.

Operations on so narrow a network are too small to be split among threads; whole samples are not.
"""

from __future__ import annotations

import os
import threading
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.multiprocessing as mp
from torch import Tensor

from tools.pretrain_nano.batches import Batch

if TYPE_CHECKING:
    from tools.pretrain_nano.course import Base


PATIENCE = 300.0
"""Seconds after which a process that does not come is given up; the first step compiles kernels."""


class Crew:
    """The other processes. The caller computes the first share itself.

    Args:
        base: what is trained, on the CPU; its parameters move to shared memory.
        count: processes in all, the caller among them.
        size: samples of a batch, at least `count`.
        folder: where the compiled kernels of `twin.py` are kept.
    """

    def __init__(self, base: Base, count: int, size: int, folder: Path) -> None:
        if size < count:
            raise SystemExit(f"a batch of {size} cannot be shared by {count} processes; give a larger --batch")
        self.base = base.share_memory()
        cuts = [size * n // count for n in range(count + 1)]
        self.shares = [slice(a, b) for a, b in pairwise(cuts)]
        context = mp.get_context("spawn")
        self.start, self.done = context.Barrier(count), context.Barrier(count)
        self.desk = Desk(size)
        self.results = [[torch.zeros_like(p).share_memory_() for p in base.parameters()] for _ in range(count - 1)]
        working, base.working = base.working, None  # each process makes its own
        self.others = [
            context.Process(
                target=_work,
                args=(base, self.desk, share, result, self.start, self.done, folder),
                daemon=True,
            )
            for share, result in zip(self.shares[1:], self.results, strict=True)
        ]
        for process in self.others:
            process.start()
        base.working = working

    def gradients(self, b: Batch, ids: Tensor) -> float:
        """Puts the gradients of a batch into the parameters; returns its mean loss."""
        self.desk.put(b, ids, trains_text=next(self.base.text.parameters()).requires_grad)
        self._meet(self.start)
        loss = self.base.gradients(b, ids, self.shares[0])
        self._meet(self.done)
        for result in self.results:
            for p, gradient in zip(self.base.parameters(), result, strict=True):
                if p.grad is not None:
                    p.grad += gradient
        return loss + float(self.desk.losses.sum())

    def _meet(self, barrier) -> None:
        try:
            barrier.wait(PATIENCE)
        except threading.BrokenBarrierError:
            ended = [process.pid for process in self.others if not process.is_alive()]
            raise SystemExit(f"a process of the crew is gone or stuck (ended: {ended}); start again to go on") from None

    def dismiss(self) -> None:
        """Ends the other processes."""
        self.desk.over.fill_(1)
        self._meet(self.start)
        for process in self.others:
            process.join()


class Desk:
    """The batch in shared memory, and what comes back besides gradients."""

    def __init__(self, size: int) -> None:
        self.latents, self.noise = (torch.zeros(size, 4, 16, 16).share_memory_() for _ in range(2))
        self.weights = torch.zeros(size, 16, 16).share_memory_()
        self.timesteps = torch.zeros(size, dtype=torch.long).share_memory_()
        self.ids = torch.zeros(size, 77, dtype=torch.long).share_memory_()
        self.trains_text, self.over = (torch.zeros((), dtype=torch.long).share_memory_() for _ in range(2))
        self.losses = torch.zeros(size).share_memory_()

    def put(self, b: Batch, ids: Tensor, trains_text: bool) -> None:
        """Lays out a batch."""
        self.latents.copy_(b.latents)
        self.noise.copy_(b.noise)
        self.timesteps.copy_(b.timesteps)
        self.weights.copy_(b.weights)
        self.ids.copy_(ids)
        self.trains_text.fill_(trains_text)

    def batch(self) -> Batch:
        """Returns what lies there; the words are there as ids only."""
        return Batch(self.latents, [""] * len(self.ids), self.noise, self.timesteps, self.weights)


def _work(base: Base, desk: Desk, share: slice, result: list[Tensor], start, done, folder: Path) -> None:
    threading.Thread(target=_leave_with_the_parent, daemon=True).start()
    torch.set_num_threads(1)
    base.compute_in_bf16(folder)
    while True:
        start.wait()
        if desk.over.item():
            return
        base.text.requires_grad_(bool(desk.trains_text))
        desk.losses[share.start] = base.gradients(desk.batch(), desk.ids, share)
        for gradient, p in zip(result, base.parameters(), strict=True):
            if p.grad is not None:
                gradient.copy_(p.grad)
        done.wait()


def _leave_with_the_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()  # a killed parent cannot tell those who wait for it
    os._exit(1)
