"""Loading and comparing bases in tests."""

from pathlib import Path

import torch
from torch import Tensor

from sdlora.families import Base, Parts, load_parts

States = dict[str, dict[str, Tensor]]
"""Weights of every component."""


def parts_of(path: Path) -> Parts:
    """Loads a folder or a file."""
    return load_parts(Base("base", path, "test"))


def states(parts: Parts) -> States:
    """Returns all weights of a base."""
    return {name: m.state_dict() for name, m in {**parts.components, "vae": parts.vae}.items()}


def assert_equal(left: States, right: States) -> None:
    """Compares bit by bit."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].keys() == right[name].keys()
        for key in left[name]:
            assert torch.equal(left[name][key], right[name][key]), f"{name} {key}"
