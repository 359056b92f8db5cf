"""The configuration of a single file's components, read off the shapes of their weights.

What no shape shows, attention heads and groups of the norms, follows the family's rule. At the usual widths that is
exact; at others it is an assumption.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sdlora.errors import ModelError
from sdlora.families.components import VAE_FACTOR
from sdlora.families.family import Family, TextEncoder
from sdlora.families.layout import Component
from sdlora.families.tokenizers import VOCABULARY_SIZE

_HEAD_WIDTH = 64
"""Channels of an attention head where the family does not fix the number of heads."""

_NORM_GROUPS = 32

CONTEXT = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
"""A weight of the denoiser whose second side is the width of the text states."""


def denoiser_config(
    found: Mapping[str, Component], family: Family, resolution: int, pooled: int | None = None
) -> dict[str, Any]:
    """Returns the configuration of the denoiser.

    Args:
        found: the file's components.
        family: what it is.
        resolution: side in pixels of the pictures that it was trained on.
        pooled: width of the pooled text, for a file without the encoder that gives it; `None` if it is not known.

    Raises:
        ModelError: if a weight that tells a width is missing, or the widths do not fit together.
    """
    denoiser = found["denoiser"]
    levels = denoiser.count("down_blocks.{}.resnets.0.conv2.weight")
    widths = tuple(denoiser.side(f"down_blocks.{i}.resnets.0.conv2.weight", 0) for i in range(levels))
    deep = [denoiser.count(f"down_blocks.{i}.attentions.0.transformer_blocks.{{}}.norm1.weight") for i in range(levels)]
    middle = denoiser.count("mid_block.attentions.0.transformer_blocks.{}.norm1.weight")
    heads = family.denoiser_config["attention_head_dim"]
    return {
        **family.denoiser_config,
        **_sizes_config(found, family, pooled),
        "sample_size": resolution // VAE_FACTOR,
        "block_out_channels": widths,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in deep),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(deep)),
        "transformer_layers_per_block": (*(max(depth, 1) for depth in deep[:-1]), middle),
        "cross_attention_dim": denoiser.side(CONTEXT, 1),
        "attention_head_dim": heads if isinstance(heads, int) else tuple(_heads(width) for width in widths),
        "norm_num_groups": _groups(widths),
    }


def _sizes_config(found: Mapping[str, Component], family: Family, given: int | None) -> dict[str, int]:
    """Returns what the denoiser expects of a picture's sizes; nothing if it is not told any.

    Where neither the file nor the user has a text encoder that gives the pooled text, that is taken to be as wide in
    relation to the text states as it is at full size.
    """
    if "addition_time_embed_dim" not in family.denoiser_config:
        return {}
    denoiser = found["denoiser"]
    total = denoiser.side("add_embedding.linear_1.weight", 1)
    spec = next(spec for spec in family.text_encoders if spec.pooled)
    if spec.component in found:
        pooled = found[spec.component].side("text_projection.weight", 0)
    elif given is not None:
        pooled = given
    else:
        share = spec.config["projection_dim"] / family.denoiser_config["cross_attention_dim"]
        pooled = round(denoiser.side(CONTEXT, 1) * share)
    width, rest = divmod(total - pooled, 6)
    if width <= 0 or rest:
        raise ModelError(
            f"{denoiser.container.path}: its denoiser takes {total} numbers beside the text states, which is no pooled "
            f"text of {pooled} and six sizes"
        )
    return {"projection_class_embeddings_input_dim": total, "addition_time_embed_dim": width}


def vae_config(vae: Component, family: Family) -> dict[str, Any]:
    """Returns the configuration of the VAE.

    Raises:
        ModelError: if a weight that tells a width is missing.
    """
    levels = vae.count("encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = tuple(vae.side(f"encoder.down_blocks.{i}.resnets.0.conv1.weight", 0) for i in range(levels))
    return {
        **family.vae_config,
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": vae.side("decoder.conv_in.weight", 1),
        "norm_num_groups": _groups(widths),
    }


def text_encoder_config(encoder: Component, spec: TextEncoder) -> dict[str, Any]:
    """Returns the configuration of a text encoder.

    Raises:
        ModelError: if a weight that tells a width is missing, or the encoder knows fewer tokens than CLIP has.
    """
    vocabulary, width = (encoder.side("embeddings.token_embedding.weight", axis) for axis in (0, 1))
    if vocabulary < VOCABULARY_SIZE:
        raise ModelError(
            f"{encoder.container.path}: a text encoder knows {vocabulary} tokens and CLIP has {VOCABULARY_SIZE}; "
            "single files bring no tokenizer, so only a diffusers folder can hold this model"
        )
    return {
        **spec.config,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": encoder.side("encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": text_layers(encoder, spec),
        "num_attention_heads": _heads(width),
        "max_position_embeddings": encoder.side("embeddings.position_embedding.weight", 0),
        "projection_dim": encoder.side("text_projection.weight", 0) if spec.pooled else width,
    }


def text_layers(encoder: Component, spec: TextEncoder) -> int:
    """Counts the layers of a text encoder, those beyond the family's number left out.

    Of the 24 layers of OpenCLIP's ViT-H, SD 2.x never sees the last, and diffusers leaves it out too.
    """
    return min(encoder.count("encoder.layers.{}.layer_norm1.weight"), spec.config["num_hidden_layers"])


def _heads(width: int) -> int:
    return max(1, width // _HEAD_WIDTH)


def _groups(widths: tuple[int, ...]) -> int:
    return math.gcd(_NORM_GROUPS, *widths)
