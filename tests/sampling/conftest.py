"""Tensors here are tiny: on them, threads do nothing but wait for each other, for minutes on a busy machine."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
