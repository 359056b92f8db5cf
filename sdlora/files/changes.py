"""What LoRAs do to the weights of a base model on the disk: matched whole, then carried out one weight at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdlora.container import Container
from sdlora.errors import LoraFileError, ModelError
from sdlora.families.places import Place
from sdlora.files.attach import advice, squeezed
from sdlora.files.kohya import ModuleWeights
from sdlora.files.merge import Weighed
from sdlora.files.webui import printable


@dataclass(frozen=True)
class Change:
    """What one module of one LoRA does.

    Attributes:
        place: where its layer's weight lies.
        weights: the module.
        factor: on the product of its factors.
    """

    place: Place
    weights: ModuleWeights
    factor: float

    def add_to(self, stored: Tensor) -> None:
        """Adds the change in place to what lies under the place's key, in the number format of that."""
        matrix = matrix_of(self.place, stored)
        down, up = (t.to(stored.dtype).flatten(1) for t in (self.weights.down, self.weights.up))
        factor = torch.tensor(self.factor, dtype=torch.float64).to(stored.dtype).item()  # beyond the format: infinite
        matrix.addmm_(up, down, alpha=factor)


def matrix_of(place: Place, stored: Tensor) -> Tensor:
    """Returns a layer's weight as (out, in * kh * kw): a view of what lies under its key."""
    part = stored if place.third is None else stored.chunk(3)[place.third]
    return part.T if place.transposed else part.flatten(1)


def layer_shape(place: Place) -> tuple[int, ...]:
    """Returns the shape of a layer's weight, without a 1 x 1 kernel."""
    return squeezed(place.shape[::-1] if place.transposed else place.shape)


Plan = dict[Path, dict[str, list[Change]]]
"""Changes by file and key."""


def plan(base: Path, table: Mapping[str, Place], sources: Sequence[Weighed]) -> Plan:
    """Finds the place of every module of every LoRA.

    Args:
        base: for messages.
        table: places by module name.
        sources: LoRAs and their strengths.

    Raises:
        LoraFileError: if a module has no place, or its change another shape than the weight there.
    """
    planned: Plan = {}
    for source in sources:
        lora = source.lora
        lost = [name for name in lora.modules if name not in table]
        if lost:
            component = "_".join(lost[0].split("_")[:2]) + "_"
            known = any(name.startswith(component) for name in table)
            where = "match no layer" if known else f"change a part that it does not hold ({printable(component)}*)"
            raise LoraFileError(
                f"{lora.path} does not fit {base}: {len(lost)} of its {len(lora.modules)} modules {where}, the first "
                f"is {printable(lost[0], 120)}.\n{advice(lora, '--into')}"
            )
        for name, weights in lora.modules.items():
            place = table[name]
            shape = squeezed(weights.shape)
            if shape != layer_shape(place):
                raise LoraFileError(
                    f"{lora.path} does not fit {base}: {name} changes a weight of shape {list(shape)}, and there it "
                    f"has {list(layer_shape(place))}.\n{advice(lora, '--into')}"
                )
            change = Change(place, weights, source.factor(name))
            planned.setdefault(place.file, {}).setdefault(place.key, []).append(change)
    return planned


def require_plain(container: Container, keys: Iterable[str]) -> None:
    """Checks that weights are floating point numbers, which can be added to.

    Raises:
        ModelError: naming the first that is not.
    """
    for key in keys:
        dtype = container.entries[key].dtype
        if not dtype.is_floating_point:
            raise ModelError(
                f"{container.path} is quantised ({printable(key)} holds {_word(dtype)}), and nothing can be added to "
                "such weights; use the original in fp16, bf16 or fp32"
            )


def changed(container: Container, key: str, changes: Sequence[Change]) -> Tensor:
    """Reads a weight and adds changes to it, in fp32 or better; rounds once, to the format it is stored in.

    Raises:
        ModelError: if a value is not finite before, or afterwards lies beyond what the format holds.
    """
    stored = container.read(key)
    dtype = stored.dtype
    value = stored.to(torch.float64 if dtype == torch.float64 else torch.float32)
    del stored
    for change in changes:
        change.add_to(value)
    if not _fits(value, dtype):
        where = f"{printable(key)} of {container.path}"
        if not _fits(container.read(key).float(), dtype):
            raise ModelError(f"{where} holds values that are infinite or not a number; download the base again")
        raise ModelError(
            f"with the LoRA, {where} would hold values that are too large for {_word(dtype)}, or not a number; nothing "
            "was written. Lower the strength, or check the LoRA"
        )
    return value.to(dtype)


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Tells whether a number format holds all values. Rounding would not: to fp8 (e4m3), torch cuts off in silence."""
    largest = torch.finfo(dtype).max
    low, high = (extreme.item() for extreme in torch.aminmax(value))  # one that is not a number makes both so
    return -largest <= low and high <= largest


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
