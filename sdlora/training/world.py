"""The processes that train together: which one this is, and what they tell each other.

Every process runs the same program. What one alone may do, such as writing files, is done by the first; what all must
agree on is decided by the first and handed round. One process alone is a world too, in which nothing is handed round
and nothing of torch's distributed package is imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdlora.errors import ConfigError, TrainingError

PATIENCE = timedelta(hours=3)
"""How long a process waits for the others: the first may draw samples meanwhile. One that dies is noticed at once."""
SEGMENT = 2**20
"""Numbers handed on at once when sums go from process to process, so that all of them work at the same time."""

T = TypeVar("T")


class ProcessLost(TrainingError):
    """Another process ended while this one waited for it."""


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local_size: how many of them run on this machine.
        device: what this one computes on, for `choose_device`: `auto`, `cpu`, or e.g. `cuda:1`.
        store: what all can write to and read from; `None` for one process.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    device: str = "auto"
    store: Any = None

    @staticmethod
    def single() -> World:
        """Returns the world of one process."""
        return World()

    @staticmethod
    def join() -> World:
        """Joins the processes that torchrun, `accelerate launch` or `sdlora train --processes` started, if one did.

        They tell a process its number through the environment: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
        MASTER_ADDR and MASTER_PORT.

        Raises:
            ConfigError: if there are more processes than GPUs, or no way for them to talk.
        """
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return World.single()
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        rank, local_rank = _number("RANK", 0), _number("LOCAL_RANK", 0)
        local_size = _number("LOCAL_WORLD_SIZE", size)
        device = _device(local_rank, local_size)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        try:
            store, rank, size = next(rendezvous("env://", rank, size, timeout=PATIENCE))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"process {rank} of {size} does not reach the others: {error}") from error
        return World(rank, size, local_size, device, PrefixStore("sdlora", store))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share_cores(self, wanted: int | None) -> None:
        """Lets each process on this machine compute with its part of the cores, unless the user decided."""
        if self.size > 1 and self.device == "cpu" and wanted is None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // self.local_size))

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.first(lambda: None)

    def first(self, make: Callable[[], T]) -> T:
        """Lets the first process make something, and hands it to all; each waits until all have asked for it.

        Raises:
            ProcessLost: if the first process fails; whatever it raises is raised there.
        """
        return self._gather(make() if self.is_first else None)[0]

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Runs a `with` block in the first process, then in all others: what it keeps in a cache is made once."""
        if not self.is_first:
            self.barrier()
        yield
        if self.is_first:
            self.barrier()

    def require_same(self, facts: Mapping[str, str]) -> None:
        """Checks that all processes start from the same.

        Args:
            facts: what must agree, e.g. `{"pictures": digest}`.

        Raises:
            TrainingError: if a process differs; raised in all of them.
        """
        everywhere = self._gather(dict(facts))
        for rank, other in enumerate(everywhere):
            odd = [name for name in everywhere[0] if other[name] != everywhere[0][name]]
            if odd:
                raise TrainingError(
                    f"process {rank} differs from process 0 in: {', '.join(odd)}; every machine needs the same "
                    "pictures, base, settings and versions"
                )

    def sum(self, *tensors: Tensor) -> None:
        """Adds tensors up over all processes, in place; in which order is left to the hardware."""
        import torch.distributed as dist

        with _waiting():
            for tensor in tensors:
                dist.all_reduce(tensor)

    def sum_in_order(self, rows: Sequence[Tensor]) -> Tensor:
        """Adds up the rows of all processes one after the other, in the order of the processes.

        So the sum does not depend on how rows are spread over processes, to the last bit: each process adds its rows to
        the sum of those before it and hands it on; the last one hands the result to all.

        Args:
            rows: (N,) each, on the CPU, at least one; the first is overwritten.

        Returns:
            The sum, (N,).
        """
        total = rows[0]
        if self.size == 1:
            return _add(total, rows[1:])
        import torch.distributed as dist

        with _waiting():
            for start in range(0, total.numel(), SEGMENT):
                parts = [row[start : start + SEGMENT] for row in rows]
                if self.is_first:
                    _add(parts[0], parts[1:])
                else:
                    before = torch.empty_like(parts[0])
                    dist.recv(before, self.rank - 1)
                    parts[0].copy_(_add(before, parts))
                if self.rank < self.size - 1:
                    dist.send(parts[0], self.rank + 1)
            dist.broadcast(total, self.size - 1)
        return total

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Lets only the process that fails first tell of it; the others, which it drags along, end in silence."""
        try:
            yield
        except BaseException as error:
            if self.size == 1 or isinstance(error, KeyboardInterrupt | SystemExit) or self._fails_first():
                raise
            sys.exit(2)

    def leave(self) -> None:
        """Parts from the others, when all are done."""
        if self.size > 1:
            import torch.distributed as dist

            self.barrier()
            dist.destroy_process_group()

    def _gather(self, own: Any) -> list[Any]:
        if self.size == 1:
            return [own]
        import torch.distributed as dist

        everywhere: list[Any] = [None] * self.size
        with _waiting():
            dist.all_gather_object(everywhere, own)
        return everywhere

    def _fails_first(self) -> bool:
        try:
            return self.store.add("failed", 1) == 1
        except RuntimeError:  # the first process holds the store, and is gone
            return False


def _add(total: Tensor, rows: Sequence[Tensor]) -> Tensor:
    for row in rows:
        total.add_(row)
    return total


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            "another process has ended; if it said nothing, it was killed, perhaps for want of memory. "
            "What was learned up to the last checkpoint is kept"
        ) from error


def _device(local_rank: int, local_size: int) -> str:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_size > count:
            raise ConfigError(f"{local_size} processes on a machine with {count} GPU(s); start one per GPU")
        torch.cuda.set_device(local_rank)
        return f"cuda:{local_rank}"
    return "cpu"


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"the environment variable {variable} must be a whole number, got {text!r}") from None
