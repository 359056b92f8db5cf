"""InvokeAI: decides by the tensors' widths what a file is for, and then looks its layers up in diffusers' models.

A file that it cannot class is not imported. SDXL's names are converted first, and a file that mixes both spellings, or
has another prefix than it expects, stops the loading. What merely has no layer is logged and passed over.

Source: InvokeAI at commit 8e71a8a (6.14), `model_manager/configs/lora.py`, `model_manager/util/model_util.py`,
`patches/lora_conversions/sdxl_lora_conversion_utils.py` and `patches/layer_patcher.py`. It runs on transformers 5.5,
whose text encoders have the level `text_model`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sdlora.families.names import original_unet
from sdlora.files.loaders.contents import Contents, key_of
from sdlora.files.loaders.layout import KINDS, Layout, Place, Shape, flat, same_product
from sdlora.files.loaders.report import Factors, Report, make_report

PROGRAM, VERSION = "InvokeAI", "6.14.0-alpha (8e71a8a)"

DOWN, UP = "lora_down.weight", "lora_up.weight"
_WIDTHS = {**KINDS, 1280: "SDXL"}
_PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_DEEP = re.compile(
    r"lora_unet_(?:(?:down_blocks|up_blocks)_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:input_blocks|output_blocks)_\d+_\d+|middle_block_\d+)_transformer_blocks_(\d+)_"
)
_TELLING = re.compile(r"lora_unet_.*(_attn2_to_[kv]\.|time_emb_proj\.lora_down)|lora_te_.*_self_attn_")
_TYPES = (DOWN, "dora_scale", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "on_input", "w_norm")
_RESNET = ("norm1", "conv1", "norm2", "conv2", "time_emb_proj", "conv_shortcut")
_ENDS = ("time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2")


def read(layout: Layout, contents: Contents) -> Report:
    """Returns what InvokeAI makes of a file."""
    shapes = {key: shape for key, shape in contents.shapes.items() if not key.startswith("bundle_emb")}
    kind = _classify(shapes)
    two = len(layout.family.text_encoders) > 1
    names = dict(_names(layout, two))
    modules = {name: parts for name, parts in contents.modules().items() if not name.startswith("bundle_emb")}
    spellings = {name: _converted(name) if two else None for name in modules}
    left = [key for key in contents.shapes if key not in shapes]
    factors = []
    for name, parts in modules.items():
        place = names.get(spellings[name] or name)
        if place is None:
            left += [key_of(name, part) for part in parts]
        elif DOWN in parts and UP in parts and "lora_mid.weight" not in parts:
            factors.append(Factors(name, place, parts[DOWN], parts[UP]))
    refusal = _refusal(kind, layout, modules, spellings, two)
    return make_report(
        PROGRAM,
        VERSION,
        layout,
        contents,
        left=left,
        factors=factors,
        fits=same_product,
        misfit="it stops drawing at a module that does not fit",
        stops=True,
        kind=kind or "Unknown",
        refusal=refusal,
        notes=["only logs the layers that it does not find"] if left and not refusal else [],
    )


def _classify(shapes: dict[str, Shape]) -> str | None:
    """Returns SD1, SD2 or SDXL by the first telling tensor, `None` if there is none."""
    if not any(key.startswith(_PREFIXES) for key in shapes):
        return None
    pair: dict[str, int] = {}
    for key, shape in shapes.items():
        name, _, part = key.partition(".")
        width = shape[1] if part in (DOWN, "hada_w1_b", "hada_w2_b", "diff") and len(shape) > 1 else None
        told = width if _TELLING.match(key) else None
        if name.startswith(("lora_te1_", "lora_te2_")) and "_self_attn_" in name and width is not None:
            pair[name[:8]] = width
            told = sum(pair.values()) if len(pair) == 2 else None
        if told is not None:
            return _WIDTHS.get(told)
    deepest = max((int(match[1]) for key in shapes if (match := _DEEP.match(key))), default=0)
    return "SDXL" if deepest >= 2 else None


def _names(layout: Layout, two: bool) -> Iterator[tuple[str, Place]]:
    for path in layout.denoiser:
        yield f"lora_unet_{flat(path)}", ("denoiser", path)
    for number, encoder in enumerate(layout.family.text_encoders, 1):
        for path in layout.components.get(encoder.component, {}):
            inside = "" if path.startswith("text_projection") else "text_model_"
            yield f"lora_te{number if two else ''}_{inside}{flat(path)}", (encoder.component, path)


def _blocks() -> Iterator[str]:
    """Yields diffusers' paths of the parts of SDXL's denoiser that InvokeAI converts."""
    for level in range(3):
        for half, count in (("down", 2), ("up", 3)):
            for index in range(count):
                yield f"{half}_blocks.{level}.attentions.{index}"
                yield from (f"{half}_blocks.{level}.resnets.{index}.{inner}" for inner in _RESNET)
        yield from (f"down_blocks.{level}.downsamplers.0.conv", f"up_blocks.{level}.upsamplers.0.conv")
    yield "mid_block.attentions.0"
    yield from (f"mid_block.resnets.{index}.{inner}" for index in range(2) for inner in _RESNET)
    yield from (*_ENDS, "conv_in", "conv_norm_out", "conv_out")


def _original(path: str) -> str:
    # `original_unet` names layers, and an attention block is none: its first layer's name tells.
    attention = ".attentions." in path
    name = original_unet(f"{path}.norm" if attention else path)
    assert name is not None
    return flat(name.removesuffix(".norm") if attention else name)


_CONVERSIONS = {_original(path): flat(path) for path in _blocks()}


def _converted(name: str) -> str | None:
    """Returns a name of SDXL's denoiser in diffusers' spelling, `None` if it is not in the original one."""
    inner = name.removeprefix("lora_unet_")
    pieces = inner.split("_")
    for length in range(len(pieces), 0, -1):
        start = "_".join(pieces[:length])
        if inner != name and start in _CONVERSIONS:
            return f"lora_unet_{_CONVERSIONS[start]}{inner[len(start) :]}"
    return None


def _refusal(
    kind: str | None,
    layout: Layout,
    modules: dict[str, dict[str, Shape]],
    spellings: dict[str, str | None],
    two: bool,
) -> str | None:
    if layout.kind is not None and kind is None:
        return "it cannot tell what the file is for: neither text layers nor cross attention have a width that it knows"
    if layout.kind is not None and kind != layout.kind:
        return f"it takes the file for {kind}, and does not offer it with a model of another kind"
    for name, parts in modules.items():
        if two and not name.startswith(("lora_unet_", "lora_te1_", "lora_te2_")):
            return f"it does not recognise the prefix of {name}"
        if not any(part in _TYPES for part in parts) or (DOWN in parts) != (UP in parts):
            return f"it does not support what {name} has: {', '.join(parts)}"
    denoiser = [name for name in modules if name.startswith("lora_unet_")]
    mixed = {spellings[name] is not None for name in denoiser}
    if two and len(mixed) == 2:
        first = next(name for name in denoiser if spellings[name] is None)
        return f"names in both spellings cannot be converted together; {first} is not in that of the others"
    return None
