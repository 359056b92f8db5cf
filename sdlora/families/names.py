"""The same weights under two names: as diffusers and transformers call them, and as the original checkpoints do.

Original are the names of Stability's `ldm` and `sgm` programs for denoiser and VAE, and OpenCLIP's for the text
encoders of SD 2.x and SDXL. All functions work on paths of modules ("mid_block.attentions.0.proj_in") as well as on
keys of state dicts ("mid_block.attentions.0.norm.weight"), and return `None` for what they do not know.

Every Stable Diffusion has two residual blocks a level, which the arithmetic here relies on.

Source: diffusers' `scripts/convert_original_stable_diffusion_to_diffusers.py`; the block table of sd-scripts'
`sdxl_model_util.py`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def original_unet(path: str, *, plain_up: Container[int] = (), separator: str = ".") -> str | None:
    """Returns the original name of a part of the denoiser.

    Args:
        path: diffusers' name, e.g. `down_blocks.1.attentions.0.proj_in`.
        plain_up: indices of the up blocks that have no attention; there the upsampler moves up one place.
        separator: "." or, in the names of LoRA modules, "_".
    """
    s = re.escape(separator)
    if match := re.fullmatch(rf"(down|up)_blocks{s}(\d){s}(resnets|attentions){s}(\d){s}(.+)", path):
        up, block, kind, index, inner = match[1] == "up", int(match[2]), match[3], int(match[4]), match[5]
        if index > (2 if up else 1):
            return None
        number = 3 * block + index + (0 if up else 1)
        inside = _swap(inner, _RESNET, separator) if kind == "resnets" else inner
        stem = ["output_blocks" if up else "input_blocks", str(number), "0" if kind == "resnets" else "1"]
        return inside and separator.join([*stem, inside])
    if match := re.fullmatch(rf"down_blocks{s}(\d){s}downsamplers{s}0{s}conv(.*)", path):
        return separator.join(["input_blocks", str(3 * int(match[1]) + 3), "0", "op"]) + match[2]
    if match := re.fullmatch(rf"up_blocks{s}(\d){s}upsamplers{s}0{s}conv(.*)", path):
        place = "1" if int(match[1]) in plain_up else "2"
        return separator.join(["output_blocks", str(3 * int(match[1]) + 2), place, "conv"]) + match[2]
    if match := re.fullmatch(rf"mid_block{s}((resnets|attentions){s}\d){s}(.+)", path):
        place = _swap(match[1], _MIDDLE, separator)
        inside = _swap(match[3], _RESNET, separator) if match[2] == "resnets" else match[3]
        return separator.join(["middle_block", place, inside]) if place and inside else None
    return _swap(path, _UNET_ENDS, separator)


def diffusers_unet(name: str, *, separator: str = ".") -> str | None:
    """Returns diffusers' name of a part of the denoiser; the inverse of `original_unet`."""
    s = re.escape(separator)
    if match := re.fullmatch(rf"output_blocks{s}(\d+){s}[12]{s}conv(.*)", name):
        number = int(match[1])
        path = separator.join(["up_blocks", str(number // 3), "upsamplers", "0", "conv"]) + match[2]
        return path if number % 3 == 2 else None
    if match := re.fullmatch(rf"input_blocks{s}(\d+){s}0{s}op(.*)", name):
        number = int(match[1])
        path = separator.join(["down_blocks", str(number // 3 - 1), "downsamplers", "0", "conv"]) + match[2]
        return path if number % 3 == 0 and number else None
    if match := re.fullmatch(rf"(input|output)_blocks{s}(\d+){s}([01]){s}(.+)", name):
        up, number, inner = match[1] == "output", int(match[2]), match[4]
        if up or number:
            block, index = divmod(number if up else number - 1, 3)
            if index == 2 and not up:
                return None
            kind = "attentions" if match[3] == "1" else "resnets"
            inside = _swap(inner, _flipped(_RESNET), separator) if kind == "resnets" else inner
            stem = ["up_blocks" if up else "down_blocks", str(block), kind, str(index)]
            return inside and separator.join([*stem, inside])
    if match := re.fullmatch(rf"middle_block{s}(\d){s}(.+)", name):
        place = _flipped(_MIDDLE).get(match[1])
        inside = _swap(match[2], _flipped(_RESNET), separator) if match[1] != "1" else match[2]
        return separator.join(["mid_block", place.replace(".", separator), inside]) if place and inside else None
    return _swap(name, _flipped(_UNET_ENDS), separator)


OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of the VAE's attention as diffusers first called them, and as it calls them now."""

_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}


def original_vae(path: str, *, levels: int = 4) -> str | None:
    """Returns the original name of a part of the VAE.

    Args:
        path: diffusers' name, e.g. `decoder.up_blocks.0.resnets.1.conv1.weight`.
        levels: number of block levels; the original counts the decoder's from the other end.
    """
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(.+)", path):
        half, way, number, inner = match[1], match[2], int(match[3]), match[4]
        if (half == "decoder") != (way == "up") or number >= levels:
            return None
        stem = f"{half}.{way}.{levels - 1 - number if way == 'up' else number}"
        if sampler := re.fullmatch(r"(?:down|up)samplers\.0\.conv(.*)", inner):
            return f"{stem}.{way}sample.conv{sampler[1]}"
        resnet = re.fullmatch(r"resnets\.(\d)\.(.+)", inner)
        inside = _swap(resnet[2], _VAE_RESNET, ".") if resnet else None
        return f"{stem}.block.{resnet[1]}.{inside}" if resnet and inside else None
    if match := re.fullmatch(r"(encoder|decoder)\.mid_block\.((resnets|attentions)\.\d)\.(.+)", path):
        place = _VAE_MIDDLE.get(match[2])
        inside = _swap(match[4], _VAE_RESNET if match[3] == "resnets" else _VAE_ATTENTION, ".")
        return f"{match[1]}.mid.{place}.{inside}" if place and inside else None
    if match := re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|conv_norm_out)(.*)", path):
        return f"{match[1]}.{match[2].replace('conv_norm_out', 'norm_out')}{match[3]}"
    return path if re.match(r"(post_)?quant_conv(\.|$)", path) else None


_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "text_projection.weight": "text_projection",
}
_THIRDS = ("q_proj", "k_proj", "v_proj")


def open_clip(path: str) -> tuple[str, int | None] | None:
    """Returns OpenCLIP's key for a part of a text encoder, and which third of its rows is meant, if not all of it.

    OpenCLIP keeps query, key and value in one matrix, and the final projection transposed.

    Args:
        path: transformers' key, with or without `text_model.` in front.
    """
    path = path.removeprefix("text_model.")
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", path)
    if match is None:
        name = _swap(path, _OPEN_CLIP, ".")
        return (name, None) if name else None
    stem, inner = f"transformer.resblocks.{match[1]}", match[2]
    if projection := re.fullmatch(r"self_attn\.([qkv]_proj)(?:\.(weight|bias))?", inner):
        return f"{stem}.attn.in_proj" + (f"_{projection[2]}" if projection[2] else ""), _THIRDS.index(projection[1])
    name = _swap(inner, _OPEN_CLIP_LAYER, ".")
    return (f"{stem}.{name}", None) if name else None


def _swap(path: str, table: Mapping[str, str], separator: str) -> str | None:
    """Replaces the beginning of a path, whole components of it, by what a table says."""
    for old, new in table.items():
        start = old.replace(".", separator)
        if path == start or path.startswith(start + separator):
            return new.replace(".", separator) + path[len(start) :]
    return None


def _flipped(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}
