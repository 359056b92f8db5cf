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
from sdlora.container import legacy_hash, model_hash, serialize
from sdlora.errors import LoraFileError
from sdlora.files.dialects import find_modules
from sdlora.files.formats import ALPHA, DOWN, UP
from sdlora.files.places import DTYPE_WORDS
from sdlora.files.webui import printable

if TYPE_CHECKING:
    from sdlora.families import Family


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
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that it changes: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

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
        format: whose spelling the file has, e.g. `kohya` or `diffusers`.
    """

    path: Path
    modules: dict[str, ModuleWeights]
    metadata: dict[str, str]
    dtype: torch.dtype
    notes: tuple[str, ...] = field(default=())
    model_hash: str = ""
    format: str = "kohya"


def read_lora(path: Path) -> LoraFile:
    """Reads a LoRA file in any dialect; its modules get the names that kohya's format gives them.

    Args:
        path: the file, or a folder that diffusers or peft saved.

    Raises:
        LoraFileError: if it is missing, damaged, no plain LoRA, incomplete, or holds values that are no numbers.
    """
    path = Path(path)
    found = find_modules(path)
    digest, tensors = hashlib.sha256(), {}
    for container in found.containers:
        data = container.data()
        digest.update(data)
        tensors[container.path] = container.tensors(data)
        del data  # before the next file's is read
    modules, without_alpha = {}, []
    for name, module in found.modules.items():
        values = {role: tensors[place.container.path][place.key] for role, place in module.places.items()}
        alpha = values[ALPHA].double().item() if ALPHA in values else module.alpha
        if alpha is None:
            without_alpha.append(name)
            alpha = float(values[DOWN].shape[0])
        modules[name] = ModuleWeights(values[DOWN], values[UP], alpha)
        _require_finite(path, name, modules[name])
    first = next(iter(modules.values()))
    return LoraFile(
        found.containers[0].path if len(found.containers) == 1 else path,
        modules,
        found.metadata,
        first.down.dtype,
        (*found.notes, *_notes(modules, without_alpha)),
        digest.hexdigest(),
        found.format,
    )


def _require_finite(path: Path, name: str, weights: ModuleWeights) -> None:
    for suffix, tensor in ((DOWN, weights.down), (UP, weights.up)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise LoraFileError(
                f"{path}: {printable(name)}{suffix} holds {bad} values that are infinite or not a number; "
                "it would turn pictures black. Train or download it again"
            )
    if not math.isfinite(weights.alpha):
        raise LoraFileError(f"{path}: alpha of {printable(name)} is {weights.alpha}; train or download the file again")


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
        tensors |= {key: cast(key, value, dtype) for key, value in exact.items()}
    return tensors


def cast(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a value rounded to a file's number format, in memory of its own, which the writer asks for.

    Raises:
        LoraFileError: if it is not finite before or after, or an alpha that vanishes.
    """
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
    return rounded.clone()


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
    del hashed  # as large as the file that is made next
    write_bytes(Path(path), serialize(tensors, {**metadata, **hashes}))
    return hashes["sshs_model_hash"]
