"""What a higher rank, larger pictures and more adapted layers cost: the step, the numbers that train, the file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from sdlora.files.kohya import write_lora
from sdlora.training.device import DTYPES
from tools.bench.measure import quartiles, take_turns
from tools.bench.ours import Ours
from tools.growth.images import Effort
from tools.growth.trainer import build, settings, square_batch, take_step


def measure_ranks(ranks: Sequence[int], effort: Effort) -> list[dict[str, Any]]:
    """Returns a row for each rank, at the base's own resolution; seconds and bytes."""
    return _compare("rank", {rank: build(settings(lora__rank=rank)) for rank in ranks}, effort)


def measure_targets(targets: Sequence[str], effort: Effort) -> list[dict[str, Any]]:
    """Returns a row for each choice of layers, at the base's own resolution; seconds and bytes."""
    return _compare("targets", {name: build(settings(lora__targets=name)) for name in targets}, effort)


def measure_resolutions(sides: Sequence[int], effort: Effort) -> list[dict[str, Any]]:
    """Returns a row for each side of a square picture in pixels; seconds."""
    trainer = build(settings())
    steps = {side: partial(take_step, trainer, square_batch(trainer.parts, side)) for side in sides}
    return [{"side": side, "step": step} for side, step in _step_times(steps, effort).items()]


def _compare(name: str, trainers: dict[Any, Ours], effort: Effort) -> list[dict[str, Any]]:
    steps = {
        key: partial(take_step, trainer, square_batch(trainer.parts, trainer.parts.resolution))
        for key, trainer in trainers.items()
    }
    times = _step_times(steps, effort)
    return [{name: key, "step": times[key], **_size(trainer)} for key, trainer in trainers.items()]


def _step_times(steps: dict[Any, Callable[[], None]], effort: Effort) -> dict[Any, dict[str, float]]:
    by_name = {str(key): step for key, step in steps.items()}
    turns = take_turns(by_name, rounds=effort.rounds, limit=effort.seconds)
    return {key: asdict(quartiles(turns.seconds[str(key)])) for key in steps}


def _size(trainer: Ours) -> dict[str, int]:
    adapters, family = trainer.adapters, trainer.parts.family
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lora.safetensors"
        write_lora(file, {"denoiser": adapters}, family, family.metadata, DTYPES[settings().output.save_dtype])
        size = file.stat().st_size
    numbers = sum(adapter.down.numel() + adapter.up.numel() for adapter in adapters.values())
    return {"layers": len(adapters), "parameters": numbers, "file_bytes": size}
