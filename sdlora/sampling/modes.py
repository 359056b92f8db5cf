"""Modules that train draw pictures in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Puts modules into eval mode for the time of a `with` block, then each submodule back into its own."""
    # Each submodule's own mode is kept: an adapter may train inside a network that does not.
    before = {m: m.training for module in modules for m in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for m, training in before.items():
            m.training = training
