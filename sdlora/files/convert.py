"""From one program's LoRA file to another's: the same changes to the same layers, and metadata that is still true."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sdlora.errors import LoraFileError
from sdlora.files.attach import looks_like
from sdlora.files.canonical import FAMILY_OF
from sdlora.files.derived import common, writable
from sdlora.files.formats import ALPHA, DOWN, UP
from sdlora.files.kohya import LoraFile, ModuleWeights, write_modules
from sdlora.files.layers import layers_of
from sdlora.files.loaders import Contents, Layout, examine
from sdlora.files.merge import common_dtype
from sdlora.files.numbered import TOKEN
from sdlora.files.peft import COMPONENTS, DIFFUSERS_NAME, PEFT_NAME, fitted, write_diffusers, write_peft
from sdlora.files.peft_config import METADATA_KEY
from sdlora.files.target import require_file_target
from sdlora.files.webui import printable

if TYPE_CHECKING:
    from sdlora.families import Family

_LAYOUT = re.compile(rf"(unet|text_encoder)(:\d+:rank)?|<.*>|format|{METADATA_KEY}")
"""Metadata that describes how the file was laid out, by diffusers, peft or cloneofsimo, and not the LoRA."""

Write = Callable[[Path, Mapping[str, ModuleWeights], str, Mapping[str, str], torch.dtype], list[Path]]
"""(target, modules, family, metadata, dtype) -> the files written."""


def _kohya(
    path: Path, modules: Mapping[str, ModuleWeights], family_name: str, metadata: Mapping[str, str], dtype: torch.dtype
) -> list[Path]:
    write_modules(path, _shaped(modules, family_name), metadata, dtype)
    return [path]


def _shaped(modules: Mapping[str, ModuleWeights], family_name: str) -> dict[str, ModuleWeights]:
    """Returns matrices as matrices and convolutions as such, for some loaders fail on the other."""
    layers = layers_of(family_name)
    return {n: fitted(w, len(layers[n].shape)) if n in layers else w for n, w in modules.items()}


def _diffusers(
    path: Path, modules: Mapping[str, ModuleWeights], family_name: str, metadata: Mapping[str, str], dtype: torch.dtype
) -> list[Path]:
    return [write_diffusers(path, modules, family_name, metadata, dtype)]


WAYS: dict[str, Write] = {"kohya": _kohya, "diffusers": _diffusers, "peft": write_peft}
"""Formats that are written."""


def convert(lora: LoraFile, target: Path, way: str, dtype: torch.dtype | None = None) -> list[Path]:
    """Writes a LoRA in another format.

    Args:
        lora: what `read_lora` returned.
        target: a .safetensors file, or a folder: kohya has only files, peft only folders, diffusers both.
        way: a key of `WAYS`.
        dtype: number format; default: the file's own; of several the one that holds all values.

    Returns:
        The files written; replaced if they exist.

    Raises:
        LoraFileError: if it is not known what the LoRA was made for, a module is no layer of that, a value does not fit
            into `dtype`, or the target is no place for that format, or is the source.
        ConfigError: if the target is no name for a file, or is the source.
        TrainingError: if the disk is full or the target cannot be written.
    """
    from sdlora.families import FAMILIES  # here, for it brings all of diffusers along

    _require_place(lora, target, way)
    kind = looks_like(lora)
    if kind not in FAMILY_OF:
        raise LoraFileError(
            f"cannot convert {lora.path}: neither tensors nor ss_base_model_version tell which model it was made for; "
            f"its layers have names like {printable(next(iter(lora.modules)), 120)}"
        )
    family = FAMILIES[FAMILY_OF[kind]]
    metadata = true_metadata(lora, family, target.stem)
    return WAYS[way](target, lora.modules, family.name, metadata, dtype or common_dtype([lora]))


def would_load(lora: LoraFile, layout: Layout) -> bool:
    """Tells whether all programs would load a LoRA whole, were it converted to kohya's format.

    Args:
        lora: what `read_lora` returned.
        layout: of the base that it is for.
    """
    shapes, alphas = {}, {}
    for name, weights in _shaped(lora.modules, layout.family.name).items():
        shapes |= {name + DOWN: tuple(weights.down.shape), name + UP: tuple(weights.up.shape), name + ALPHA: ()}
        alphas[name + ALPHA] = weights.alpha
    contents = Contents(shapes, true_metadata(lora, layout.family, lora.path.stem), alphas)
    return not any(loss for report in examine(layout, contents) for loss in report.losses())


def _require_place(lora: LoraFile, target: Path, way: str) -> None:
    is_file = target.suffix.lower() == ".safetensors"
    if way == "kohya" or (way == "diffusers" and is_file):
        return require_file_target(target, [lora.path])
    if is_file:
        raise LoraFileError(f"{target} must be a folder: peft has one for each component")
    if target.exists() and not target.is_dir():
        raise LoraFileError(f"{target} is a file; give a folder, or a name that ends with .safetensors")
    files = [target, target / DIFFUSERS_NAME, *(target / part / PEFT_NAME for part in COMPONENTS.values())]
    if lora.path.resolve() in [file.resolve() for file in files]:
        raise LoraFileError(f"{target} is where {lora.path} lies, which is never overwritten; give another name")


def true_metadata(lora: LoraFile, family: Family, name: str) -> dict[str, str]:
    """Returns a LoRA's metadata with all that programs go by, and without what described the old file's layout.

    Args:
        lora: its own metadata is kept; only what would class it with another base is replaced.
        family: what it was made for.
        name: the LoRA's name, if it has none.

    Source: `kohya-format.md`, sections 4 and 6.
    """
    own = {key: text for key, text in lora.metadata.items() if not _LAYOUT.fullmatch(key) and text != TOKEN}
    added = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": common({weights.rank for weights in lora.modules.values()}),
        "ss_network_alpha": common({weights.alpha for weights in lora.modules.values()}),
        "ss_output_name": name.lstrip("{"),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
    }
    classed = own.get("ss_base_model_version", "").startswith(family.metadata["ss_base_model_version"])
    known = {**family.metadata, **own} if classed else {**own, **family.metadata}
    values = {**added, **known, "ss_v2": family.metadata["ss_v2"]}
    return {writable(key): writable(text) for key, text in values.items()}
