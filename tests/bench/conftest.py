import pytest
import torch

from tools.bench.contest import build_reference
from tools.bench.results import OURS, REFERENCE
from tools.bench.rows import NANO, Row


@pytest.fixture
def row() -> Row:
    """The smallest thing that can be measured: nano with pictures of 8 x 8 latents."""
    return Row(name="tiny", group="cpu", base=NANO, side=64, batch=1, precision="fp32")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def twins() -> dict:
    """Two sides that are the same."""
    return {OURS: build_reference, REFERENCE: build_reference}
