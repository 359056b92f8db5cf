"""Everything a resumed run needs, in files that are complete or absent. No pickle: tensors and JSON.

A checkpoint is a folder whose `state.json`, written last, lists size and SHA-256 of the other files. Data order, noise
and learning rate are functions of (seed, step), so the adapters, the optimizer and the step are all there is to keep.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdlora.adapters import Lora
from sdlora.atomic import explained, flush, replacing, write_text
from sdlora.errors import TrainingError
from sdlora.faults import place

_FILES = ("adapters.safetensors", "optimizer.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: where it lies.
        step: optimizer steps done.
        facts: what else was stored: settings, digest of the data set, loss scale.
    """

    folder: Path
    step: int
    facts: dict[str, Any]


def save_checkpoint(
    folder: Path,
    step: int,
    adapters: Mapping[str, Mapping[str, Lora]],
    optimizer: torch.optim.Optimizer,
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes `folder/step-NNNNNNNN` and removes the oldest beyond `keep`; one that is there already is left as it is.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        adapters: component -> path -> adapter.
        optimizer: its tensors are stored by parameter number.
        facts: JSON values to store beside.
        keep: how many checkpoints remain, this one included, at least 1.

    Raises:
        TrainingError: if it cannot be written, or values are not finite; earlier checkpoints are then untouched.
    """
    contents = (_adapter_tensors(adapters), _optimizer_tensors(optimizer))
    for tensors in contents:
        _require_finite(tensors, step)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    for name, tensors in zip(_FILES, contents, strict=True):
        with replacing(temporary / name) as path:
            save_file(tensors, path)
    files = {name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in _FILES}
    state = json.dumps({"step": step, "files": files, **facts}, indent=1)
    if _whole(final) == json.loads(state):
        shutil.rmtree(temporary, ignore_errors=True)
        return final
    write_text(temporary / "state.json", state)
    try:
        place("checkpoint written")
        shutil.rmtree(final, ignore_errors=True)  # damaged, or of a run whose course was changed
        os.replace(temporary, final)
        place("checkpoint in place")
        flush(folder)
        _remove_old(folder, final, keep)
    except OSError as error:
        raise explained(final, error) from error
    return final


def _remove_old(folder: Path, final: Path, keep: int) -> None:
    # What lies beyond this step was found damaged when the run was resumed; it must not push out what is good.
    older = [path for path in sorted(folder.glob("step-*")) if path.name < final.name]
    newer = [path for path in folder.glob("step-*") if path.name > final.name]
    for path in [*older[: max(0, len(older) - keep + 1)], *newer]:
        shutil.rmtree(path, ignore_errors=True)
        place("checkpoint removed")


def prune(folder: Path) -> bool:
    """Removes all checkpoints but the newest whole one, and what was begun; returns whether that made room."""
    newest = next((path for path in sorted(folder.glob("step-*"), reverse=True) if _whole(path)), None)
    begun = folder.glob(".step-*")
    useless = [path for path in (*folder.glob("step-*"), *begun) if path != newest] if newest else list(begun)
    for path in useless:
        shutil.rmtree(path, ignore_errors=True)
    return bool(useless)


def _whole(folder: Path) -> dict[str, Any] | None:
    """Returns what a checkpoint's `state.json` says if all files are as it says, else `None`."""
    try:
        return _verified(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verified(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, expected in state["files"].items():
        if _sha256(folder / name) != expected["sha256"]:
            raise ValueError(f"{name} is damaged")
    return state


def _require_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    # One number for all of them, so that a GPU is asked once.
    odd = sum((~torch.isfinite(x)).sum() for x in tensors.values() if x.is_floating_point())
    if int(odd):
        raise TrainingError(
            f"{int(odd)} values are infinite or not a number after step {step}, so no checkpoint of it is written; "
            "go on from the one before with --resume and a lower learning rate, or --precision fp32 in a new run"
        )


def latest_checkpoint(folder: Path) -> tuple[Checkpoint, list[str]]:
    """Returns the newest checkpoint that is whole, and a line for each newer one that is not.

    Raises:
        TrainingError: if there is none.
    """
    skipped: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        try:
            state = _verified(candidate)
            return Checkpoint(candidate, int(state["step"]), state), skipped
        except (OSError, ValueError, KeyError, TypeError) as error:
            skipped.append(f"skipped the damaged checkpoint {candidate}: {error}")
    problem = "; ".join(skipped) or "it was stopped before the first one was written"
    raise TrainingError(f"no checkpoint to resume from in {folder} ({problem}); start the run anew in another folder")


def restore_checkpoint(
    checkpoint: Checkpoint, adapters: Mapping[str, Mapping[str, Lora]], optimizer: torch.optim.Optimizer
) -> None:
    """Puts a checkpoint's values into live adapters and a live optimizer.

    Raises:
        TrainingError: if they belong to other layers or have another rank.
    """
    saved = load_file(checkpoint.folder / _FILES[0])
    live = _adapter_tensors(adapters)
    odd = saved.keys() ^ live.keys() or {k for k in live if live[k].shape != saved[k].shape}
    if odd:
        raise TrainingError(f"{checkpoint.folder} does not fit this run: {len(odd)} tensors differ, first: {min(odd)}")
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(saved[key])
    state = optimizer.state_dict()
    by_number: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_file(checkpoint.folder / _FILES[1]).items():
        number, _, name = key.partition(".")
        by_number.setdefault(int(number), {})[name] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(v["exp_avg"].shape != parameters[n].shape for n, v in by_number.items() if n < len(parameters)):
        raise TrainingError(f"{checkpoint.folder} was written by another version of sdlora; start the run anew")
    optimizer.load_state_dict({"state": by_number, "param_groups": state["param_groups"]})


def _adapter_tensors(adapters: Mapping[str, Mapping[str, Lora]]) -> dict[str, Tensor]:
    return {
        f"{component}.{path}.{name}": parameter.detach()
        for component, by_path in adapters.items()
        for path, adapter in by_path.items()
        for name, parameter in (("down", adapter.down), ("up", adapter.up))
    }


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
