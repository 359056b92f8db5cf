"""cloneofsimo's LoRA files, whose layers have no names but numbers.

`unet:9:up` is the tenth layer of its kind that Python met when it walked through the model, in the order in which
diffusers and transformers of early 2023 registered their layers. That order is written out here, and every shape is
checked against it.

Source: cloneofsimo/lora, `lora_diffusion/lora.py`, `_find_modules_v2` and `save_safeloras_with_embeds`; diffusers 0.10,
`models/unet_2d_condition.py`, `unet_2d_blocks.py`, `attention.py`; transformers 4, `models/clip/modeling_clip.py`.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping

from sdlora.container import Container
from sdlora.errors import LoraFileError
from sdlora.files.formats import DOWN, UP
from sdlora.files.places import Module, Place, require_complete
from sdlora.files.webui import printable

NUMBERED = re.compile(r"(unet|text_encoder):(\d{1,6}):(up|down)")
"""A key of such a file."""

TOKEN = "<embed>"
"""What the metadata says of a tensor that is the embedding of a new word."""

_COMPONENTS = {"unet": "denoiser", "text_encoder": "text_encoder"}
_USUAL = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
_INSIDE = {  # class of modules whose layers were changed -> how the layers' paths look
    "CrossAttention": r"\.attn[12]\.",
    "Attention": r"\.attn[12]\.",
    "GEGLU": r"\.ff\.net\.0\.proj$",
    "FeedForward": r"\.ff\.",
    "ResnetBlock2D": r"\.resnets\.",
    "CLIPAttention": r"\.self_attn\.",
    "CLIPMLP": r"\.mlp\.",
}

_REGISTERED = (  # which of the parts of one module came first
    ("down_blocks", "up_blocks", "mid_block"),
    ("attentions", "resnets"),
    ("attn1", "ff", "attn2"),
    ("to_q", "to_k", "to_v", "to_out"),
    ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    ("self_attn", "mlp"),
    ("k_proj", "v_proj", "q_proj", "out_proj"),
    ("fc1", "fc2"),
)
_LATER = (*_REGISTERED[:2], ("attn1", "attn2", "ff"), *_REGISTERED[3:])
"""The same in later versions of diffusers."""


def numbered_modules(container: Container) -> tuple[dict[str, Module], list[str]]:
    """Returns the modules of a file by names in kohya's manner, and notes on what is not part of the LoRA.

    Raises:
        LoraFileError: if a key is of no such kind, a number is missing, or the shapes are not those of the layers.
    """
    path, entries = container.path, container.entries
    modules: dict[str, dict[int, Module]] = {}
    others = []
    for key in entries:
        match = NUMBERED.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        module = modules.setdefault(match[1], {}).setdefault(int(match[2]), Module())
        role = UP if match[3] == "up" else DOWN
        if role in module.places:
            raise LoraFileError(f"{path} holds one layer twice, as {module.places[role]} and as {key}; export it again")
        module.places[role] = Place(container, key)
    tokens = [key for key in others if container.metadata.get(key) == TOKEN or re.fullmatch(r"<.+>", key)]
    surplus = [key for key in others if key not in tokens]
    if surplus:
        raise LoraFileError(f"{path} is a cloneofsimo LoRA, and its key {printable(surplus[0], 120)!r} belongs to none")
    named: dict[str, Module] = {}
    for model, by_number in modules.items():
        require_complete(path, {f"layer {number} of {model}": m for number, m in by_number.items()})
        named |= _named(container, model, by_number)
    for module in named.values():
        module.alpha = float(module.shape[0])  # these files know no alpha: the scale is 1
    return named, [embeddings_note(tokens)] if tokens else []


def embeddings_note(words: Iterable[str]) -> str:
    """Says that embeddings of new words are left out."""
    shown = ", ".join(printable(word, 40) for word in itertools.islice(words, 8))
    return f"it also holds embeddings of new words, {shown}, which are no part of the LoRA and are left out"


def _named(container: Container, model: str, by_number: Mapping[int, Module]) -> dict[str, Module]:
    """Returns the modules of one model by name, after checking each against the layer that its number means."""
    path, count = container.path, len(by_number)
    lost = next((number for number in range(count) if number not in by_number), None)
    if lost is not None:
        raise LoraFileError(f"{path}: layer {lost} of {model} is missing; without it the numbers mean nothing")
    problem = f"no model of Stable Diffusion has {count} such layers"
    for layers in _orders(model, _classes(container, model)):
        if len(layers) != count:
            continue
        wrong = next((i for i, (_, shape) in enumerate(layers) if _full(by_number[i]) != shape), None)
        if wrong is None:
            return {name: by_number[i] for i, (name, _) in enumerate(layers)}
        has, needed = list(_full(by_number[wrong])), list(layers[wrong][1])
        problem = f"layer {wrong} of {model} fits a weight of {has}, and {layers[wrong][0]} is {needed}"
    raise LoraFileError(f"{path} is a cloneofsimo LoRA of an unknown order of layers: {problem}")


def _full(module: Module) -> tuple[int, ...]:
    """Returns the shape of the weight that a module changes."""
    return (module.places[UP].entry.shape[0], *module.shape[1:])


def _classes(container: Container, model: str) -> list[str]:
    """Returns the names of the classes whose layers were changed, which the metadata lists."""
    text = container.metadata.get(model)
    if text is None:
        return _USUAL[model]
    try:
        classes = json.loads(text)
    except (ValueError, RecursionError):
        classes = None
    if not isinstance(classes, list) or not classes or not all(isinstance(c, str) and c in _INSIDE for c in classes):
        raise LoraFileError(
            f"{container.path}: its metadata says that layers of {printable(text, 100)} in {model} were changed; known "
            f"are {', '.join(_INSIDE)}"
        )
    return classes


def _orders(model: str, classes: list[str]) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Yields the orders that the layers may have: name and shape of the weight."""
    from sdlora.files.layers import layers_of  # here, for it brings all of diffusers along

    inside = re.compile("|".join(_INSIDE[c] for c in classes))
    for family, order, convolutions in itertools.product(("sd1", "sd2"), (_REGISTERED, _LATER), (False, True)):
        rank = {part: number for parts in order for number, part in enumerate(parts)}
        chosen = {
            layer.path: (name, layer.shape)
            for name, layer in layers_of(family).items()
            if layer.component == _COMPONENTS[model]
            and inside.search(layer.path)
            and (convolutions or len(layer.shape) == 2)
        }

        def place(path: str, rank: Mapping[str, int] = rank) -> list[int]:
            return [int(part) if part.isdigit() else rank.get(part, 0) for part in path.split(".")]

        yield [chosen[path] for path in sorted(chosen, key=place)]
