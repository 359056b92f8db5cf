"""TensorBoard events beside `metrics.jsonl`, for those who have it installed and ask for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdlora.errors import ConfigError


def require_tensorboard() -> None:
    """Checks that events can be written, before hours of work.

    Raises:
        ConfigError: if the library is missing.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError('output.tensorboard needs a library that is missing: pip install "sdlora[tensorboard]"')


class Board:
    """Writes the numbers of every step as scalars.

    Args:
        folder: where the event files go.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, entry: Mapping[str, Any]) -> None:
        """Writes one line of the metrics; `step` says where it belongs."""
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """Flushes what is still in memory."""
        self._writer.close()
