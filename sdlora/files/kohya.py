"""LoRA files in kohya's format: the one spelling that every Stable Diffusion program loads.

A module is three tensors: NAME.lora_down.weight, NAME.lora_up.weight and NAME.alpha. Its change to the layer's weight
is alpha / rank * up down. Reading refuses whatever could act at a wrong strength;
writing refuses what could not be read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdlora.adapters import Lora
from sdlora.atomic import write_bytes
from sdlora.container import Container, legacy_hash, model_hash, open_container, serialize
from sdlora.errors import LoraFileError
from sdlora.files.formats import ALPHA, DOWN, UP, require_kohya

if TYPE_CHECKING:
    from sdlora.families import Family

DTYPE_WORDS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
"""Number formats that LoRA tensors are read from, and their names in `output.save_dtype`."""


def update_norm(down: Tensor, up: Tensor, scale: float) -> float:
    """Returns the Frobenius norm of scale * up down without forming the product.

    ||U D||^2 = trace((U'U) (D D')), which needs r x r numbers instead of out x in.

    Args:
        down: (r, in) or (r, in, kh, kw).
        up: (out, r) or (out, r, 1, 1).
        scale: alpha / rank.
    """
    d, u = down.double().flatten(1), up.double().flatten(1)
    square = ((u.T @ u) * (d @ d.T)).sum().item()
    return abs(scale) * math.sqrt(max(square, 0.0))


@dataclass(frozen=True)
class ModuleWeights:
    """One module: down (r, in) or (r, in, kh, kw), up (out, r) or (out, r, 1, 1), as they stand in the file."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner width of the factors."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor alpha / rank on the product of the factors."""
        return self.alpha / self.rank

    @property
    def norm(self) -> float:
        """Frobenius norm of the change to the layer's weight."""
        return update_norm(self.down, self.up, self.scale)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that has been read and checked.

    Attributes:
        path: the file.
        modules: weights by module name, e.g. `lora_unet_mid_block_attentions_0_proj_in`.
        metadata: texts from a stranger; see `sdlora.files.metadata.printable`.
        dtype: number format of the factors; the first module's where they differ.
        notes: what is unusual, in sentences for the user.
        model_hash: sha256 of the tensors' bytes, recomputed; `sshs_model_hash` should be equal to it.
    """

    path: Path
    modules: dict[str, ModuleWeights]
    metadata: dict[str, str]
    dtype: torch.dtype
    notes: tuple[str, ...] = field(default=())
    model_hash: str = ""


def read_lora(path: Path) -> LoraFile:
    """Reads a LoRA file.

    Raises:
        LoraFileError: if it is missing, damaged, in another format, incomplete, or holds values that are no numbers.
    """
    path = Path(path)
    container = open_container(path)
    names = require_kohya(path, container.entries)
    _require_complete(container, names)
    data = container.data()
    tensors = container.tensors(data)
    modules, without_alpha = {}, []
    for name in names:
        down, up, alpha = tensors[name + DOWN], tensors[name + UP], tensors.get(name + ALPHA)
        if alpha is None:
            without_alpha.append(name)
        rank = down.shape[0]
        modules[name] = ModuleWeights(down, up, float(rank) if alpha is None else alpha.double().item())
        _require_finite(path, name, modules[name])
    first = next(iter(modules.values()))
    return LoraFile(
        path,
        modules,
        container.metadata,
        first.down.dtype,
        _notes(modules, without_alpha),
        hashlib.sha256(data).hexdigest(),
    )


def _require_complete(container: Container, names: list[str]) -> None:
    """Checks partners, number formats and shapes from the header alone."""
    path, entries = container.path, container.entries
    for name in names:
        for have, lack in ((UP, DOWN), (DOWN, UP)):
            if name + lack not in entries:
                there = have if name + have in entries else ALPHA
                raise LoraFileError(f"{path}: {name} has {there[1:]} but no {lack[1:]}; the file is incomplete")
        down, up = entries[name + DOWN], entries[name + UP]
        for suffix, entry in ((DOWN, down), (UP, up)):
            if entry.dtype not in DTYPE_WORDS:
                raise LoraFileError(f"{path}: {name}{suffix} holds {entry.dtype}; LoRA factors are floating point")
        fits = len(down.shape) == len(up.shape) and len(down.shape) in (2, 4) and down.shape[0] == up.shape[1]
        if not fits or 0 in down.shape or 0 in up.shape or any(side != 1 for side in up.shape[2:]):
            raise LoraFileError(
                f"{path}: the factors of {name} do not fit together: down {list(down.shape)}, up {list(up.shape)}; "
                "expected are [r, in] with [out, r], or [r, in, kh, kw] with [out, r, 1, 1]"
            )
        alpha = entries.get(name + ALPHA)
        if alpha is not None and alpha.shape not in ((), (1,)):
            raise LoraFileError(f"{path}: alpha of {name} has shape {list(alpha.shape)}; it must be one number")


def _require_finite(path: Path, name: str, weights: ModuleWeights) -> None:
    for suffix, tensor in ((DOWN, weights.down), (UP, weights.up)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise LoraFileError(
                f"{path}: {name}{suffix} holds {bad} values that are infinite or not a number; "
                "it would turn pictures black. Train or download it again"
            )
    if not math.isfinite(weights.alpha):
        raise LoraFileError(f"{path}: alpha of {name} is {weights.alpha}; train or download the file again")


def _notes(modules: Mapping[str, ModuleWeights], without_alpha: list[str]) -> tuple[str, ...]:
    notes = []
    if without_alpha:
        notes.append(
            f"{len(without_alpha)} of {len(modules)} modules have no alpha; alpha = rank is taken, as all programs do"
        )
    formats = sorted({DTYPE_WORDS[t.dtype] for m in modules.values() for t in (m.down, m.up)})
    if len(formats) > 1:
        notes.append(f"the factors are stored in several number formats: {', '.join(formats)}")
    idle = sum(1 for m in modules.values() if m.alpha == 0 or not m.up.any() or not m.down.any())
    if idle:
        which = "every module is" if idle == len(modules) else f"{idle} of {len(modules)} modules are"
        notes.append(f"{which} zero and change{'s' if idle == len(modules) else ''} nothing")
    return tuple(notes)


def module_names(adapters: Mapping[str, Mapping[str, Lora]], family: Family) -> dict[str, Lora]:
    """Returns adapters, given by component and path, by their module names in a file.

    Raises:
        LoraFileError: if there are none, or two would get one name, or a name that a file cannot carry.
    """
    named: dict[str, Lora] = {}
    for component, by_path in adapters.items():
        for path, adapter in by_path.items():
            name = family.lora_key(component, path)
            if name in named or "." in name:
                problem = "is the name of two layers" if name in named else "has a dot, which loaders take for its end"
                raise LoraFileError(f"cannot write a LoRA: {name} ({component}, {path}) {problem}")
            named[name] = adapter
    if not named:
        raise LoraFileError("cannot write a LoRA: there are no adapters; inject some first")
    return named


def adapter_modules(adapters: Mapping[str, Mapping[str, Lora]], family: Family) -> dict[str, ModuleWeights]:
    """Returns the values of adapters, given by component and path, by their module names in a file."""
    named = module_names(adapters, family)
    return {n: ModuleWeights(a.down.detach().cpu(), a.up.detach().cpu(), a.alpha) for n, a in named.items()}


def module_tensors(modules: Mapping[str, ModuleWeights], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the tensors of a LoRA file: down, up and alpha of every module.

    Args:
        modules: weights by module name.
        dtype: number format of the file, alpha included.

    Raises:
        LoraFileError: if a value is not finite before or after rounding to `dtype`.
    """
    tensors = {}
    for name, weights in modules.items():
        exact = {name + DOWN: weights.down, name + UP: weights.up, name + ALPHA: torch.tensor(weights.alpha)}
        tensors |= {key: _cast(key, value, dtype) for key, value in exact.items()}
    return tensors


def _cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not torch.isfinite(value).all():
        raise LoraFileError(
            f"cannot write {key}: it holds infinite values or values that are not a number; the training has broken "
            "down. Lower the learning rate, or go back to an earlier checkpoint"
        )
    rounded = value.to(dtype)
    lost = key.endswith(ALPHA) and value.item() != 0 and rounded.item() == 0
    if lost or not torch.isfinite(rounded).all():
        raise LoraFileError(
            f"cannot write {key} as {DTYPE_WORDS.get(dtype, dtype)}: {value.abs().max():.4g} is out of its range; "
            'use output.save_dtype = "bf16" or "fp32"'
        )
    return rounded.clone()  # of its own memory, which the writer asks for


def write_lora(
    path: Path,
    adapters: Mapping[str, Mapping[str, Lora]],
    family: Family,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> str:
    """Writes adapters as a LoRA file, whole or not at all; equal input gives equal bytes.

    Args:
        path: the file; replaced if it exists.
        adapters: component -> path -> adapter.
        family: names the modules.
        metadata: texts; the two `sshs_` hashes are added.
        dtype: torch.float16, torch.bfloat16 or torch.float32.

    Returns:
        `sshs_model_hash`: sha256 of the tensors' bytes.

    Raises:
        LoraFileError: if names collide or a value does not fit into `dtype`.
        TrainingError: if the disk is full or the folder cannot be written.
    """
    return write_modules(path, adapter_modules(adapters, family), metadata, dtype)


def write_modules(
    path: Path, modules: Mapping[str, ModuleWeights], metadata: Mapping[str, str], dtype: torch.dtype
) -> str:
    """Writes modules as a LoRA file; see `write_lora`.

    Args:
        path: the file; replaced if it exists.
        modules: weights by module name, on the CPU.
        metadata: texts; the two `sshs_` hashes are added, or replaced.
        dtype: torch.float16, torch.bfloat16 or torch.float32.
    """
    tensors = module_tensors(modules, dtype)
    # kohya hashes a file that carries the ss_ keys only; the legacy hash depends on that header's length.
    hashed = serialize(tensors, {key: text for key, text in metadata.items() if key.startswith("ss_")})
    hashes = {"sshs_model_hash": model_hash(hashed), "sshs_legacy_hash": legacy_hash(hashed)}
    write_bytes(Path(path), serialize(tensors, {**metadata, **hashes}))
    return hashes["sshs_model_hash"]
