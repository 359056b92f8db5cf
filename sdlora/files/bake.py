"""LoRAs into a checkpoint for good: a file or folder like the base, in which the changes are part of the weights.

Tensors are read, changed and written one after the other, so memory is needed for the largest, not for all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdlora.atomic import explained, replacing
from sdlora.container import Container, open_container, write_stream
from sdlora.errors import ModelError
from sdlora.families import Family
from sdlora.families.folders import read_json
from sdlora.families.layout import AVERAGE
from sdlora.families.places import component_weights, places
from sdlora.files.changes import Change, Plan, changed, plan, require_plain
from sdlora.files.derived import origins, writable
from sdlora.files.merge import Weighed, require_weighty
from sdlora.files.target import require_file_target, require_folder_target, require_space

_HASHES = re.compile(r"modelspec\.hash_sha256|sshs_\w+")

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb")
"""Endings of files that may hold a model's weights."""


@dataclass(frozen=True)
class Baked:
    """What was written.

    Attributes:
        family: of the base.
        num_weights: tensors that were changed.
        num_bytes: size of the whole.
        notes: what the user should know of it, a sentence each.
    """

    family: Family
    num_weights: int
    num_bytes: int
    notes: tuple[str, ...]


def bake(base: Path, sources: Sequence[Weighed], out: Path) -> Baked:
    """Writes a base model with LoRAs added to its weights. Number formats, names and other tensors stay as they are.

    Sums are taken in fp32 and rounded once. Nothing is left behind if anything goes wrong.

    Args:
        base: a single .safetensors file or a diffusers folder.
        sources: LoRAs and their strengths.
        out: the file or the folder; a folder must be new or empty.

    Raises:
        ConfigError: if `out` is in the way of something.
        LoraFileError: if a LoRA does not fit the base whole, or has the strength 0.
        ModelError: if the base is damaged or quantised, or a result is not finite.
        TrainingError: if the disk is full or cannot be written.
    """
    require_weighty(sources)
    inputs = [base, *(source.lora.path for source in sources)]
    (require_file_target if base.is_file() else require_folder_target)(out, inputs)
    family, table = places(base)
    planned = plan(base, table, sources)
    containers = {path: open_container(path, "base model", ModelError) for path in planned}
    for path, container in containers.items():
        require_plain(container, planned[path])
    if base.is_file():
        notes = _bake_file(containers[base], planned[base], sources, out)
    else:
        notes = _bake_folder(base, containers, planned, sources, out)
    written = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    num_weights = sum(map(len, planned.values()))
    return Baked(family, num_weights, sum(path.stat().st_size for path in written), tuple(notes))


def _bake_file(
    container: Container, changes: dict[str, list[Change]], sources: Sequence[Weighed], out: Path
) -> list[str]:
    require_space(out, container.path.stat().st_size)
    _write(container, changes, sources, out)
    averages = sum(key.startswith(AVERAGE) for key in container.entries)
    if not averages or any(key.startswith(AVERAGE) for key in changes):
        return []
    return [f"{averages} tensors of the moving average ({AVERAGE}*) stay as they are; programs draw with the others"]


def _write(container: Container, changes: dict[str, list[Change]], sources: Sequence[Weighed], out: Path) -> None:
    with replacing(out) as temporary:
        write_stream(
            temporary,
            {key: (entry.dtype, entry.shape) for key, entry in container.entries.items()},
            _metadata(container, sources),
            lambda key: changed(container, key, changes[key]) if key in changes else container.read(key),
        )


def _metadata(container: Container, sources: Sequence[Weighed]) -> dict[str, str]:
    """Returns the base's metadata: without hashes, which became false, and with what was merged, before and now."""
    kept = {writable(key): writable(text) for key, text in container.metadata.items() if not _HASHES.fullmatch(key)}
    try:
        before: Any = json.loads(kept.get("sdlora_merged", "[]"))
    except (ValueError, RecursionError):
        before = []  # no text of ours
    merged = [*(before if isinstance(before, list) else []), *origins(sources)]
    return {**kept, "sdlora_merged": json.dumps(merged)}


def _bake_folder(
    base: Path, containers: dict[Path, Container], planned: Plan, sources: Sequence[Weighed], out: Path
) -> list[str]:
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and not _hidden(base, path)]
    stale = _stale(base, files, {path.parent for path in planned})
    files = [path for path in files if path not in stale]
    require_space(out, sum(path.stat().st_size for path in files))
    with _new_folder(out) as folder:
        for path in files:
            target = folder / path.relative_to(base)
            if path in planned:
                _write(containers[path], planned[path], sources, target)
            else:
                with replacing(target) as temporary:
                    shutil.copyfile(path, temporary)
    return [f"{path.relative_to(base)} holds weights without the LoRA and was left out" for path in stale]


def _hidden(base: Path, path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(base).parts)


def _stale(base: Path, files: Sequence[Path], components: set[Path]) -> list[Path]:
    """Finds files that hold the weights of a changed component once more, unchanged: other variants, whole checkpoints.

    A program that picked one of them would draw without the LoRA.
    """
    read = {container.path for folder in components for container in component_weights(folder).values()}
    stale = []
    for path in files:
        if path.parent == base or path.parent in components:
            index = ".safetensors.index." in path.name and path.suffix == ".json"
            holds = _shards(path) if index else {path} if path.suffix in _WEIGHTS else set()
            if not holds <= read:
                stale.append(path)
    return stale


def _shards(index: Path) -> set[Path]:
    table = read_json(index).get("weight_map")
    return {index.parent / str(name) for name in table.values()} if isinstance(table, dict) else set()


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yields a folder beside `out`, which on leaving without an error becomes `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name[:40]}-", dir=out.parent) as temporary:
            folder = Path(temporary) / out.name
            folder.mkdir()
            yield folder
            if out.is_dir():
                out.rmdir()  # empty, and Windows replaces no folder
            os.replace(folder, out)
    except OSError as error:
        raise explained(out, error) from error
