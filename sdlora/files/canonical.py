"""One name for each layer, whatever the file calls it: kohya's, which every program loads.

kohya names the denoiser's layers by diffusers' path for Stable Diffusion 1.x and 2.x, by the original program's for
SDXL. So it must be known first what a file was made for. Names and widths of the tensors tell; metadata, which may be
missing or edited, is asked only if they are silent.

Source: `kohya-format.md`, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

NAMES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "nano": "sdlora's embedded base (nano)",
    "unknown": "an unknown model",
}
"""What a LoRA may have been made for, in words."""

_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 128: "nano"}
"""Width of the text states that a denoiser attends to. Source: InvokeAI's probe; for nano, its own configuration."""

_DENOISER = "lora_unet_"
_ORIGINAL = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)_\d")
_DIFFUSERS = re.compile(
    r"lora_unet_((down_blocks|up_blocks)_\d|mid_block|(time|add)_embedding_linear|conv_(in|out|norm_out)$)"
)
_ONLY_SDXL = re.compile(  # deeper transformers, attention in the first block up, and an embedding of sizes
    r"lora_unet_(.*_transformer_blocks_[1-9]_|up_blocks_0_attentions|output_blocks_[012]_1_(proj|trans)|add_|label_)"
)
_ONLY_SD = re.compile(  # a fourth level, and attention in the highest and the third
    r"lora_unet_(down_blocks_(0_attentions|3)|up_blocks_(3|2_attentions|2_upsamplers)"
    r"|input_blocks_([12]_1|9|10|11)_|output_blocks_([678]_1|9|10|11)_|output_blocks_2_1_conv)"
)
FAMILY_OF = {"sd1": "sd1", "nano": "sd1", "sd2": "sd2", "sdxl": "sdxl"}
"""What `made_for` returns -> the family of that, a key of `FAMILIES`; nothing for an unknown model."""

_TEXT = re.compile(r"lora_te\d?_")
_TEXT_WIDTHS = {768: "sd1", 1024: "sd2"}
"""Width of the states in a single text encoder. Source: InvokeAI's probe."""


def made_for(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> str:
    """Tells what a LoRA was made for: a key of `NAMES`.

    Args:
        shapes: of every module's down factor, by module name in either spelling.
        metadata: the file's.
    """
    if any(name.startswith(("lora_te1_", "lora_te2_")) for name in shapes):
        return "sdxl"
    width = next((s[1] for name, s in shapes.items() if "attn2_to_k" in name or "attn2_to_v" in name), None)
    if width in _WIDTHS:
        return _WIDTHS[width]
    if any(_ONLY_SDXL.match(name) for name in shapes):
        return "sdxl"
    if width is not None:
        return "unknown"
    if any(_ORIGINAL.match(name) for name in shapes) and not any(_ONLY_SD.match(name) for name in shapes):
        return "sdxl"
    version = metadata.get("ss_base_model_version", "")
    for start, kind in (("sdxl", "sdxl"), ("sd_v2", "sd2"), ("sd_v1", "sd1")):
        if version.startswith(start):
            return kind
    told = (s[1] for name, s in shapes.items() if name.startswith("lora_te_") and "self_attn" in name)
    return _TEXT_WIDTHS.get(next(told, 0), "unknown")


def both_spellings(names: Iterable[str]) -> tuple[str, str] | None:
    """Returns a name of the denoiser in diffusers' spelling and one in the original, if both occur."""
    names = list(names)
    found = [next((name for name in names if spelling.match(name)), None) for spelling in (_DIFFUSERS, _ORIGINAL)]
    return (found[0], found[1]) if found[0] and found[1] else None


def canonical(shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]) -> dict[str, str]:
    """Returns the canonical name of every module.

    Where nothing tells which model the file was made for, names stay as they are, and so do those that belong to no
    layer of it: they will be refused when the file is put onto a base.

    Args:
        shapes: of every module's down factor, by module name in one of the two spellings.
        metadata: the file's.
    """
    kind = made_for(shapes, metadata)
    spell = _unchanged
    if kind == "sdxl":
        spell = _original
    elif kind != "unknown" or any(_ONLY_SD.match(name) for name in shapes):
        spell = _diffusers
    return {name: _text(spell(name), kind) for name in shapes}


def _unchanged(name: str) -> str:
    return name


def _original(name: str) -> str:
    if not _DIFFUSERS.match(name):
        return name
    from sdlora.families.names import original_unet  # not before it is needed, for it brings all of diffusers along

    return _joined(original_unet(name.removeprefix(_DENOISER), separator="_"), name)


def _diffusers(name: str) -> str:
    if not _ORIGINAL.match(name):
        return name
    from sdlora.families.names import diffusers_unet

    return _joined(diffusers_unet(name.removeprefix(_DENOISER), separator="_"), name)


def _joined(path: str | None, name: str) -> str:
    return _DENOISER + path if path else name


def _text(name: str, kind: str) -> str:
    match = _TEXT.match(name)
    if match is None:
        return name
    prefix, inside = match[0], name[match.end() :]
    if prefix == "lora_te_" and kind == "sdxl":
        prefix = "lora_te1_"
    # transformers 5 has no level `text_model` any more, and some files are named straight after its modules.
    return prefix + ("text_model_" if inside.startswith("encoder_layers_") else "") + inside
