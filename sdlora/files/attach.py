"""Putting a LoRA file onto a loaded base model: every module must find its layer, or nothing is changed.

Programs that skip what does not match leave the user with a picture that is merely wrong. Here the whole file is
matched first, and a file made for another model is refused by saying what it was made for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdlora.adapters import Adapter, Lora, Target, find_layers, inject
from sdlora.adapters.lora import factor_shapes
from sdlora.errors import LoraFileError
from sdlora.files.canonical import NAMES, made_for
from sdlora.files.webui import printable

if TYPE_CHECKING:
    from sdlora.families import Parts
    from sdlora.files.kohya import LoraFile, ModuleWeights

_ALL = (Target(layers=("Linear", "Conv2d")),)


def looks_like(lora: LoraFile) -> str:
    """Tells what a LoRA was made for: a key of `NAMES`.

    Names and widths of the tensors decide; metadata, which may be missing or edited, is asked only if they are silent.
    """
    return made_for({name: weights.down.shape for name, weights in lora.modules.items()}, lora.metadata)


def attach(parts: Parts, lora: LoraFile, strength: float = 1.0, trainable: bool = False) -> dict[str, dict[str, Lora]]:
    """Puts a LoRA into a base model, on top of adapters that are already there.

    Args:
        parts: changed in place; nothing is changed if the file does not fit.
        lora: what `read_lora` returned.
        strength: factor on the whole change; 1 is what was trained.
        trainable: whether the new adapters' factors shall train; all else is frozen.

    Returns:
        The new adapters: component -> path -> adapter, holding the file's values in fp32.

    Raises:
        LoraFileError: if a module matches no layer or its shape is another; says what the file was made for.
    """
    layers = dict(_layers(parts))
    _require_matches(lora, parts, layers)
    factors = {name: _fitted(lora, parts, name, weights, layers[name][2]) for name, weights in lora.modules.items()}
    chosen: dict[str, dict[str, nn.Module]] = {}
    names: dict[tuple[str, str], str] = {}
    for name in lora.modules:
        component, path, module = layers[name]
        chosen.setdefault(component, {})[path] = module
        names[component, path] = name

    def make(component: str, path: str, module: nn.Module) -> Lora:
        weights, (down, up) = lora.modules[names[component, path]], factors[names[component, path]]
        adapter = Lora(module, weights.rank, weights.alpha)
        with torch.no_grad():
            adapter.down.copy_(down)
            adapter.up.copy_(up)
        adapter.strength = strength
        return adapter

    attached = {}
    for component, paths in chosen.items():
        model = parts.components[component]
        attached[component] = inject(model, paths, lambda path, module, c=component: make(c, path, module))
        for adapter in attached[component].values():
            adapter.down.requires_grad_(trainable)
            adapter.up.requires_grad_(trainable)
    return attached


def _layers(parts: Parts) -> Iterator[tuple[str, tuple[str, str, nn.Module]]]:
    """Yields every layer that a file can name: (name, (component, path, layer or adapter in its place))."""
    seen: set[str] = set()
    for component, model in parts.components.items():
        for path, module in find_layers(model, _ALL).items():
            name = parts.family.lora_key(component, path)
            if name in seen:
                raise LoraFileError(
                    f"{name} is the name of two layers of {parts.name}; no LoRA file can tell them apart"
                )
            seen.add(name)
            yield name, (component, path, module)


def _require_matches(lora: LoraFile, parts: Parts, layers: Mapping[str, object]) -> None:
    lost = [name for name in lora.modules if name not in layers]
    if lost:
        raise LoraFileError(
            f"{lora.path} does not fit {_describe(parts)}: {len(lost)} of its {len(lora.modules)} modules "
            f"match no layer, the first is {printable(lost[0], 120)}.\n{advice(lora)}"
        )


def _fitted(
    lora: LoraFile, parts: Parts, name: str, weights: ModuleWeights, module: nn.Module
) -> tuple[Tensor, Tensor]:
    """Returns a module's factors in the shapes that its layer needs."""
    layer = module.layer if isinstance(module, Adapter) else module
    try:
        wanted = factor_shapes(layer, weights.rank)
    except TypeError as error:
        raise LoraFileError(f"{lora.path}: {name} changes a layer that takes no LoRA here: {error}") from error
    if tuple(map(squeezed, (weights.down.shape, weights.up.shape))) != tuple(map(squeezed, wanted)):
        wrong = f"down {list(weights.down.shape)}, up {list(weights.up.shape)}"
        needed = f"down {list(wanted[0])}, up {list(wanted[1])}"
        raise LoraFileError(
            f"{lora.path} does not fit {_describe(parts)}: {name} has {wrong}, and the layer needs {needed}.\n"
            f"{advice(lora)}"
        )
    return weights.down.reshape(wanted[0]), weights.up.reshape(wanted[1])


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a weight's shape without a 1 x 1 kernel.

    SD 2's proj_in is a Linear in diffusers and a 1 x 1 convolution elsewhere; both hold the same numbers.
    """
    return shape[:2] if all(side == 1 for side in shape[2:]) else shape


def _describe(parts: Parts) -> str:
    state = parts.denoiser.named_parameters()
    width = next((w.shape[1] for path, w in state if re.search(r"attn2\.to_k\.(base\.)*weight$", path)), None)
    return f"{parts.name} ({parts.family.name}" + (f", text width {width})" if width else ")")


def advice(lora: LoraFile, option: str = "--base") -> str:
    """Says what a LoRA that does not fit was made for, and which option names another base."""
    named = lora.metadata.get("ss_sd_model_name", "None")
    base = "" if named in ("", "None") else f" ({''.join(c for c in named if c.isprintable())[:100]})"
    return f"The file looks as if made for {NAMES[looks_like(lora)]}{base}; choose its base with {option}"
