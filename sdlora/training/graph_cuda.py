"""Recording on CUDA, as torch's documentation asks for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 2
"""Runs on the side stream before recording: libraries make their plans and workspaces at the first."""


class CudaRecorder:
    """Makes CUDA graphs that share one pool of memory.

    They may share it because they run one after another and leave nothing in it: results go to buffers outside.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._side = torch.cuda.Stream(device)

    def record(self, compute: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Runs a computation twice on the side stream and records it there; see `recording.Recorder`.

        Raises:
            RuntimeError: of any kind that torch has for "cannot be recorded", out of memory included.
        """
        current = torch.cuda.current_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.empty_cache()  # what lies in the cache of one stream cannot be used by another
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                for _ in range(WARM_UPS):
                    compute()
            current.wait_stream(self._side)
            # "thread_local": what loader threads ask of the driver meanwhile does not spoil the recording.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                compute()
        except RuntimeError:
            self._pool = torch.cuda.graph_pool_handle()  # the old one may count as being recorded into
            raise
        finally:
            torch.cuda.set_stream(current)  # a recording that fails at its end leaves its own stream behind
        return graph

    def room(self) -> int:
        """Returns the bytes that the driver can give and those that torch holds without use."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def peak(self, compute: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """Runs a computation; returns its result and the most bytes it held. Torch's record of the peak restarts."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = compute()
        return result, torch.cuda.max_memory_allocated(self.device) - before
