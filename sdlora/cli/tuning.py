"""Sets this process up for long computations: freed memory is kept, and large tensors lie in large pages.

A step frees as much memory as it takes, and by default the allocator gives most of it back to the system, which hands
it out again page by page, zeroed: 20 000 faults a step of SD 1.5 at 256 x 256 pixels, 60 000 at 512 x 512. With the
settings here there are fewer than 1 000, and the peak of the memory is the same. Steps then take 0.87 to 0.98 times as
long (`tools/bench`, SD 1.5 in bf16 and nano in fp32, two cores).

Only the command line does so, for its process is its own; a program that uses sdlora as a library decides for itself.
"""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Numbers of glibc's `mallopt`."""
_KEPT = {
    _MMAP_THRESHOLD: 32 << 20,  # the most that it takes; above, memory is given back as before
    _TRIM_THRESHOLD: 2**31 - 1,
    _TOP_PAD: 64 << 20,
}
_LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""torch's own setting: asks Linux for large pages for tensors from 2 MB on. It is read once, at the first tensor."""


def tune_process() -> None:
    """Sets memory up; due before torch is imported. What the user has set in the environment stays.

    Does nothing outside Linux, and without glibc nothing but the large pages.
    """
    if sys.platform != "linux":
        return
    os.environ.setdefault(_LARGE_PAGES, "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    for number, value in _KEPT.items():
        mallopt(number, value)
