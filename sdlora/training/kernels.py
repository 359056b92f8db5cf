"""What makes the frozen part of a step fast on this machine: packed weights and the quickest attention."""

from __future__ import annotations

import platform
from typing import Any

import psutil  # comes with accelerate
import torch
from torch import nn

from sdlora.attention.choose import Fastest, candidates, sdpa
from sdlora.attention.processor import attend_with
from sdlora.data.cache import Cache
from sdlora.frozen import freeze_layers
from sdlora.frozen.packed import PackedConv2d, PackedLinear

PACKED_COPIES = 2
"""Arranged copies of each weight: one for the way forward, one for the way back."""
LEAST_PACKED = 200_000
"""Numbers in a linear layer's weight from which on packing pays; below, calling oneDNN costs more than it saves."""
SHARE_OF_MEMORY = 0.5
"""Of the free memory, at most so much goes into packed weights."""


def choose_packing(model: nn.Module, wanted: str, device: torch.device, room: int | None = None) -> tuple[bool, str]:
    """Tells whether the weights of a model should be packed, and why.

    Args:
        model: the denoiser, in the format of the products.
        wanted: `auto` packs on a CPU where memory allows; `on` and `off` are taken as they are.
        device: where training runs.
        room: bytes that it may take at most; `None` sets no limit.
    """
    if device.type != "cpu":
        return False, "a GPU needs none"
    if wanted != "auto":
        return wanted == "on", "as asked for"
    if not torch.backends.mkldnn.is_available():
        return False, "this torch has no oneDNN"
    needed = PACKED_COPIES * sum(w.numel() * w.element_size() for w in _weights(model))
    if room is not None and needed > room:
        return False, f"it would take {needed / 1e9:.1f} GB, and train.memory leaves {max(0, room) / 1e9:.1f} GB for it"
    free = psutil.virtual_memory().available
    if needed > SHARE_OF_MEMORY * free:
        return False, f"it would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return True, f"{needed / 1e9:.1f} GB more memory"


def pack(model: nn.Module) -> int:
    """Packs the weights of a model's frozen layers, those inside adapters too; returns how many layers it were."""
    return len(freeze_layers(model, _packed))


def _packed(path: str, layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer) if layer.weight.numel() >= LEAST_PACKED else None
    if isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str):
        return PackedConv2d(layer) if layer.padding_mode == "zeros" else None
    return None


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]  # type: ignore[misc]


def install_attention(
    denoiser: Any, dtype: torch.dtype, cache: Cache | None = None, *, choose: bool = True
) -> Fastest | None:
    """Gives every plain attention layer of a denoiser the quickest kernel.

    Kernels round differently. So what was measured once is kept, and the next run on this machine, with the same torch
    and as many threads, computes the same.

    Args:
        denoiser: on its device.
        dtype: number format of the products.
        cache: where choices are kept; `None`: nowhere.
        choose: whether to choose at all, or to take torch's own.

    Returns:
        What chooses, where there is a choice: in half precision on a CPU or CUDA.
    """
    device = next(denoiser.parameters()).device
    found = candidates(device, dtype) if choose else None
    choice = Fastest(found) if found else None
    if choice and cache:
        _keep_choices(choice, cache, Cache.key("attention", sorted(choice.candidates), str(dtype), *_machine(device)))
    attend_with(choice or sdpa, denoiser)
    return choice


def _keep_choices(choice: Fastest, cache: Cache, key: str) -> None:
    choice.restore(cache.facts(key) or {})
    choice.told = lambda: cache.keep_facts(key, choice.choices())


def _machine(device: torch.device) -> tuple[str, ...]:
    """Returns what the time of a kernel depends on."""
    if device.type == "cuda":
        return torch.__version__, torch.cuda.get_device_name(device)
    processor = torch.backends.cpu.get_cpu_capability(), platform.machine(), platform.node()
    return torch.__version__, *processor, str(torch.get_num_threads())
