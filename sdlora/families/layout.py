"""A single file by components: whose key is whose, and where each weight lies that diffusers knows by another name.

A single file has everything under one roof, each component behind its prefix, in the names of the programs that trained
it: Stability's for denoiser and VAE, Hugging Face's or OpenCLIP's for the text encoders.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cache

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sdlora.container import Container
from sdlora.errors import ModelError
from sdlora.families.family import Family, TextEncoder
from sdlora.families.names import open_clip, original_unet, original_vae
from sdlora.families.sd1 import SD1
from sdlora.families.sdxl import SDXL
from sdlora.weights import Weight

DENOISER = "model.diffusion_model."
AVERAGE = "model_ema."
VAE = "first_stage_model."

_BARE_DENOISER = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_BARE_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

Section = dict[str, str]
"""The keys of one component: its own name of a weight -> key in the file."""


@dataclass(frozen=True)
class Source:
    """Where the values of one weight lie.

    Attributes:
        name: the component's own name of it, without the prefix.
        third: which third of its rows is meant, 0 to 2; `None`: all of it.
        transposed: whether it is stored the other way round.
    """

    name: str
    third: int | None = None
    transposed: bool = False


Sources = Callable[[str], Source | None]
"""Name of a weight -> where it lies; `None` if the original layout has no such thing."""


@dataclass(frozen=True)
class Component:
    """One component of a single file, by diffusers' and transformers' names of its weights.

    Attributes:
        container: the file.
        section: its keys.
        source: where its weights lie.
        prefix: what stands in front of its keys.
    """

    container: Container
    section: Section
    source: Sources
    prefix: str = ""

    def __contains__(self, path: str) -> bool:
        source = self.source(path)
        return source is not None and source.name in self.section

    def found(self, path: str) -> Source:
        """Returns where a weight lies.

        Raises:
            ModelError: if the file lacks it.
        """
        source = self.source(path)
        if source is None:
            raise ModelError(f"{self.container.path}: the original layout has no place for {path}")
        if source.name not in self.section:
            lacking = self.prefix + source.name
            raise ModelError(f"{self.container.path} is incomplete: it has no {lacking}; download or export it again")
        return source

    def key(self, path: str) -> str:
        """Returns the key in the file under which a weight lies; raises as `found` does."""
        return self.section[self.found(path).name]

    def stored_shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a weight as it lies in the file, its third taken.

        Raises:
            ModelError: if the file lacks it, or it has no thirds.
        """
        shape = self.container.entries[self.key(path)].shape
        if self.found(path).third is None:
            return shape
        if not shape or shape[0] % 3:
            raise ModelError(f"{self.container.path} is damaged: {self.key(path)} has the shape {list(shape)}")
        return (shape[0] // 3, *shape[1:])

    def shape(self, path: str) -> tuple[int, ...]:
        """Returns the shape of a weight as the model has it; raises as `stored_shape` does."""
        shape = self.stored_shape(path)
        return shape[::-1] if self.found(path).transposed else shape

    def side(self, path: str, axis: int) -> int:
        """Returns one side of a weight.

        Raises:
            ModelError: if the file lacks the weight, or it has no such side, or nothing along it.
        """
        shape = self.shape(path)
        if axis >= len(shape) or not shape[axis]:
            raise ModelError(f"{self.container.path} is damaged: {self.key(path)} has the shape {list(shape)}")
        return shape[axis]

    def weight(self, path: str) -> Weight:
        """Returns a weight to be read; raises as `stored_shape` does."""
        self.stored_shape(path)
        source = self.found(path)
        return Weight(self.container, self.section[source.name], source.third, source.transposed)

    def count(self, pattern: str) -> int:
        """Counts how many weights there are whose name is the pattern with 0, 1, 2, ... in its gap."""
        number = 0
        while pattern.format(number) in self:
            number += 1
        return number


def components(container: Container, family: Family) -> dict[str, Component]:
    """Finds the components of a file that are there: `denoiser`, `vae` and the family's text encoders."""
    found = {"denoiser": denoiser(container), "vae": vae(container)}
    found |= {spec.component: text_encoder(container, spec) for spec in family.text_encoders}
    return {name: component for name, component in found.items() if component.section}


def denoiser(container: Container) -> Component:
    """Finds the denoiser: behind its prefix, without one, or, if there is nothing else, its moving average."""
    prefix, section = DENOISER, _behind(DENOISER, container.entries)
    if not section and "input_blocks.0.0.weight" in container.entries:
        prefix, section = "", {key: key for key in container.entries if key.startswith(_BARE_DENOISER)}
    if not section:
        prefix, section = AVERAGE, _averaged(container.entries)
    plain_up = [i for i in range(4) if f"output_blocks.{3 * i}.1.norm.weight" not in section]
    return Component(container, section, denoiser_sources(plain_up), prefix)


def vae(container: Container) -> Component:
    """Finds the VAE: behind its prefix, or without one in a file that holds nothing else."""
    prefix, section = VAE, _behind(VAE, container.entries)
    if not section and "decoder.conv_in.weight" in container.entries:
        prefix, section = "", {key: key for key in container.entries if key.startswith(_BARE_VAE)}
    levels = len({name.split(".")[2] for name in section if name.startswith("decoder.up.")})
    return Component(container, section, vae_sources(levels), prefix)


def text_encoder(container: Container, spec: TextEncoder) -> Component:
    """Finds a text encoder. The `text_model.` in Hugging Face's names, which the oldest files lack, is dropped."""
    section = _behind(spec.original, container.entries)
    if not spec.open_clip:
        section = {name.removeprefix("text_model."): key for name, key in section.items()}
    usual = text_sources(spec)

    def source(path: str) -> Source | None:  # some programs write OpenCLIP's final projection in Hugging Face's way
        turned = path == "text_projection.weight" and path in section
        return Source(path) if turned else usual(path)

    return Component(container, section, source, spec.original)


def denoiser_sources(plain_up: Collection[int]) -> Sources:
    """Returns where the denoiser's weights lie; see `names.original_unet`."""
    return lambda path: _source(original_unet(path, plain_up=plain_up))


def vae_sources(levels: int) -> Sources:
    """Returns where the VAE's weights lie; see `names.original_vae`."""
    return lambda path: _source(original_vae(path, levels=levels))


def text_sources(spec: TextEncoder) -> Sources:
    """Returns where a text encoder's weights lie; Hugging Face's names are without `text_model.`."""

    def source(path: str) -> Source | None:
        path = path.removeprefix("text_model.")
        if not spec.open_clip:
            return Source(path)
        found = open_clip(path)
        return Source(*found, transposed=found[0] == "text_projection") if found else None

    return source


def _source(name: str | None) -> Source | None:
    return Source(name) if name else None


def _behind(prefix: str, keys: Iterable[str]) -> Section:
    return {key[len(prefix) :]: key for key in keys if key.startswith(prefix)}


def _averaged(keys: Iterable[str]) -> Section:
    """Finds the moving average of the denoiser, whose names lost their dots.

    Source: `LitEma` in Stability's `ldm/modules/ema.py`.
    """
    dotless = _behind(AVERAGE + "diffusion_model", keys)
    return {name: key for short, key in dotless.items() if (name := _dotted().get(short))} if dotless else {}


@cache
def _dotted() -> dict[str, str]:
    """Returns the original names of all weights that a denoiser can have, by what is left of them without dots."""
    names = {}
    for family in (SD1, SDXL):  # 2.x has the names of 1.x
        with torch.device("meta"):
            paths = UNet2DConditionModel(**family.denoiser_config).state_dict()
        for source in map(denoiser_sources(family.plain_up), paths):
            if source is not None:
                names[source.name.replace(".", "")] = source.name
    return names
