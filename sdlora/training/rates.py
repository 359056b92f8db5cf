"""Learning rates where a recorded update can read them: as tensors on the device, changed in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class DeviceRates:
    """The learning rates of an optimizer's groups, as tensors.

    The groups themselves keep plain numbers, which the loop sets and checkpoints hold; they are exchanged for the
    tensors only while the optimizer steps.

    Args:
        optimizer: a torch optimizer.
        device: where it steps.
    """

    def __init__(self, optimizer: Any, device: torch.device) -> None:
        self.optimizer, self._device = optimizer, device
        self._tensors = [torch.zeros((), device=device) for _ in optimizer.param_groups]

    @property
    def recordable(self) -> bool:
        """Whether the optimizer reads everything on the device: torch's fused ones, and ours that say `capturable`."""
        groups = self.optimizer.param_groups
        fused = all(group.get("fused") and "capturable" in group for group in groups)
        return fused or bool(getattr(self.optimizer, "capturable", False))

    def load(self) -> None:
        """Copies the groups' numbers to the device, without waiting for it."""
        for tensor, group in zip(self._tensors, self.optimizer.param_groups, strict=True):
            tensor.fill_(group["lr"])

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Lets the optimizer read the tensors; where it cannot, its numbers stay."""
        if not self.recordable:
            yield
            return
        # Torch's optimizers refuse to be recorded unless they were told, and warn if they were told and are not.
        recording = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        groups = self.optimizer.param_groups
        before = [dict(group) for group in groups]
        try:
            for group, tensor in zip(groups, self._tensors, strict=True):
                group["lr"] = tensor
                if "capturable" in group:
                    group["capturable"] = recording
            yield
        finally:
            for group, old in zip(groups, before, strict=True):
                group.update(old)
