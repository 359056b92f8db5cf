"""How much memory a side takes at its peak: what CUDA's allocator counted, or what the process had resident."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def resident() -> int:
    """Returns the bytes of this process that are in memory now."""
    return _field("VmRSS")


class Peak:
    """The highest memory since it was made, in bytes beyond what was in use then.

    On the CPU it is resident memory, so the sides that are compared need processes of their own: what one has freed
    may stay resident and serve the other for nothing.

    Source: Linux, `Documentation/filesystems/proc.rst`: writing 5 to `clear_refs` resets VmHWM.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._now()
        self.reset()

    def reset(self) -> None:
        """Forgets the peak so far; what counts as in use before stays."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _CLEAR.write_text(_RESET_PEAK)

    @property
    def bytes(self) -> int:
        """The peak since the last reset."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return _field("VmHWM") - self._before

    def _now(self) -> int:
        return torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else resident()


def _field(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {name}"
    return int(match[1]) * 1024
