"""Two checkpoints side by side: which layers both have, and where they differ by more than rounding."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora.container import Container, open_container
from sdlora.errors import ModelError
from sdlora.families import Family
from sdlora.families.layout import components
from sdlora.families.places import Place, component_folder, component_weights, places
from sdlora.files.changes import layer_shape, matrix_of, require_plain
from sdlora.files.webui import printable

DENOISER = re.compile(
    r"lora_unet_(down_blocks|mid_block|up_blocks|input_blocks_[1-9]\d*|middle_block|output_blocks)_.*"
)
"""Layers of the denoiser that trainers put LoRAs on and every program knows; not its two ends, nor what embeds time.

Source: `kohya-format.md`, section 2.
"""

TEXT = re.compile(r"lora_te\d?_text_model_encoder_layers_.*")
"""The same of text encoders: neither embeddings nor the final projection."""


_Stored = tuple[Container, str]
"""A file and the key of a tensor in it."""


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one family.

    Attributes:
        base: the first, a .safetensors file or a diffusers folder.
        tuned: the second.
        family: of both.
        before: where the weights of the layers lie in the first, by module name.
        after: the same of the second.
        containers: the opened files.
    """

    base: Path
    tuned: Path
    family: Family
    before: dict[str, Place]
    after: dict[str, Place]
    containers: dict[Path, Container]

    def layers(self, *kinds: re.Pattern[str]) -> list[str]:
        """Returns the names of the layers of some kinds, which both must have, in equal shapes.

        Raises:
            ModelError: if the two are built differently, or a weight is quantised.
        """
        named = [{n: p for n, p in table.items() if _is(n, kinds)} for table in (self.before, self.after)]
        for path, table, other in ((self.base, *named), (self.tuned, *reversed(named))):
            lost = [name for name in other if name not in table]
            if lost:
                raise ModelError(
                    f"{self.base} and {self.tuned} cannot be compared: {len(lost)} layers are missing in {path}, the "
                    f"first is {printable(lost[0])}"
                )
            for place in table.values():
                require_plain(self.containers[place.file], [place.key])
        before, after = named
        for name, place in before.items():
            if layer_shape(place) != layer_shape(after[name]):
                raise ModelError(
                    f"{self.base} and {self.tuned} cannot be compared: the weight of {printable(name)} has the shape "
                    f"{list(layer_shape(place))} in the first and {list(layer_shape(after[name]))} in the second"
                )
        return list(before)

    def difference(self, name: str) -> Tensor | None:
        """Returns the second's weight of a layer minus the first's; `None` if it is no more than rounding.

        Returns:
            (out, in * kh * kw), fp32.

        Raises:
            ModelError: if a value is not finite.
        """
        old, new = (self._read(table[name]) for table in (self.before, self.after))
        if is_rounding(old, new):
            return None
        change = torch.empty(old.shape, dtype=torch.float32)
        for a, b, difference in _blocks(old, new, change):
            torch.sub(b.float(), a.float(), out=difference)
        if not change.isfinite().all():
            raise ModelError(
                f"the weight of {printable(name)} holds values that are infinite or not a number in {self.base} or "
                f"{self.tuned}; download it again"
            )
        return change

    def _read(self, place: Place) -> Tensor:
        return matrix_of(place, self.containers[place.file].read(place.key))

    def other_differences(self, names: list[str]) -> int:
        """Counts the tensors that differ besides the weights of some layers, in the components that these belong to.

        Where one checkpoint is a file and the other a folder, names differ and 0 is returned.
        """
        taken = {(place.file, place.key) for table in (self.before, self.after) for n in names if (place := table[n])}
        touched = {spec.component for spec in self.family.text_encoders if _has(names, spec.lora_prefix)} | {"denoiser"}
        old, new = (dict(self._tensors(path, touched)) for path in (self.base, self.tuned))
        return sum(
            not _equal(old[name], new[name])
            for name in old.keys() & new.keys()
            if (old[name][0].path, old[name][1]) not in taken
        )

    def _tensors(self, path: Path, wanted: set[str]) -> Iterator[tuple[tuple[str, str], _Stored]]:
        """Yields every tensor of some components of one of the two: (component, its own name), where it lies."""
        if path in self.containers:  # a single file; of a folder, the files in it are
            found = components(self.containers[path], self.family)
            for component in wanted & found.keys():
                for name, key in found[component].section.items():
                    yield (component, name), (found[component].container, key)
            return
        for component in wanted:
            for key, container in component_weights(component_folder(path, component)).items():
                yield (component, key), (container, key)


def open_pair(base: Path, tuned: Path) -> Pair:
    """Opens two checkpoints; reads headers only.

    Raises:
        ModelError: if one is damaged or not supported, or they are of two families.
    """
    (family, before), (other, after) = places(base), places(tuned)
    if family is not other:
        raise ModelError(
            f"{base} is {family.title} and {tuned} is {other.title}; only checkpoints of one family can be compared"
        )
    files = {place.file for table in (before, after) for place in table.values()}
    containers = {file: open_container(file, "base model", ModelError) for file in files}
    return Pair(base, tuned, family, before, after, containers)


def is_rounding(old: Tensor, new: Tensor) -> bool:
    """Tells whether two weights may be one that was rounded to their two number formats: no element differs by more.

    Rounding moves a number by half of the format's `eps` times its size at most, or by half of the smallest step near
    zero. In two equal formats this allows for a difference in the last bit.

    Args:
        old: the first, (m, n), floating point, as it is stored.
        new: the second.
    """
    infos = [torch.finfo(stored.dtype) for stored in (old, new)]
    share = sum(info.eps for info in infos) / 2
    least = sum(info.smallest_normal * info.eps for info in infos) / 2
    for a, b in _blocks(old, new):
        a, b = a.float(), b.float()
        if torch.equal(a, b):
            continue
        size = torch.maximum(a.abs(), b.abs())
        if not ((b - a).abs() <= size * share + least).all() or size.max() == torch.inf:
            return False
    return True


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts matrices of one shape into blocks of rows of some MB in fp32, so that no step needs them whole."""
    rows = max(1, (1 << 20) // tensors[0].shape[1])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _is(name: str, kinds: tuple[re.Pattern[str], ...]) -> bool:
    return any(kind.fullmatch(name) for kind in kinds)


def _has(names: list[str], prefix: str) -> bool:
    return any(name.startswith(prefix + "_") for name in names)


def _equal(*stored: _Stored) -> bool:
    old, new = (container.read(key) for container, key in stored)
    if old.shape != new.shape or not (old.is_floating_point() and new.is_floating_point()) or not old.numel():
        return old.shape == new.shape and torch.equal(old, new)
    return is_rounding(old.reshape(-1, 1), new.reshape(-1, 1))
