"""Counts the operations that torch dispatches: each costs microseconds of Python and C++ however small its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FREE = frozenset({"aten::_unsafe_view", "aten::lift_fresh"})
"""Do nothing to the data, though their schemas do not say that they are views."""


def is_free(operation: Any) -> bool:
    """Tells whether an operation only looks at the same memory in another way: a view, detach, alias, split.

    The rule: some result of it shares an argument's memory and is not written to. The profiler's marks, which
    optimizers set, are free too.
    """
    schema = operation._schema
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return views or schema.name in FREE or schema.name.startswith("profiler::")


class OperationCounter(TorchDispatchMode):
    """Counts what reaches the dispatcher below autograd while it is active, views left out.

    So an operation of a forward pass, one of autograd's backward pass, one in the body of a custom
    `autograd.Function` and one of the optimizer all count the same: once a call. A fused kernel is one call. Autograd
    hands the mode on to the threads of its backward pass.

    Attributes:
        counts: calls by the operation's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """All calls."""
        return self.counts.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Counts a call and lets it through."""
        if not is_free(func):
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def count_operations(step: Callable[[], object]) -> int:
    """Returns how many operations a call dispatches, views left out."""
    with torch.random.fork_rng(devices=[]), OperationCounter() as counter:
        step()
    return counter.total
