"""How much is drawn at once follows from the size of the pictures; merging takes a part of the free memory only."""

from dataclasses import replace

import pytest
import torch

from sdlora.sampling.prompts import Prompt
from sdlora.sampling.room import pictures_at_once, room_for_merging


class Elsewhere:
    """A base on a device that this machine may lack."""

    vae_factor = 8

    def __init__(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize(
    ("device", "side", "expected"),
    [
        ("cpu", 128, 4),
        ("cpu", 256, 4),
        ("cpu", 512, 1),
        ("cpu", 1024, 1),
        ("cuda", 128, 16),
        ("cuda", 512, 8),
        ("cuda", 1024, 2),
        ("mps", 1024, 2),
        ("cuda", 4096, 1),
    ],
)
def test_smaller_pictures_are_drawn_more_at_once(device, side, expected):
    assert pictures_at_once(Elsewhere(device), Prompt("", width=side, height=side)) == expected


def test_a_base_that_shrinks_more_takes_more():
    parts = Elsewhere("cuda")
    prompt = Prompt("", width=1024, height=512)
    few = pictures_at_once(parts, prompt)
    parts.vae_factor = 16
    assert pictures_at_once(parts, prompt) == 4 * few == pictures_at_once(parts, replace(prompt, height=512)) == 16


def test_merged_weights_get_half_of_the_free_memory_at_most():
    import psutil

    room = room_for_merging(torch.device("cpu"))
    assert 0 < room <= psutil.virtual_memory().total / 2
    assert room_for_merging(torch.device("mps")) is None


def test_on_a_gpu_memory_that_torch_holds_unused_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 600)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert room_for_merging(torch.device("cuda")) == 700
