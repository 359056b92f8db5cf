"""Telling the formats of LoRA files apart by their keys, so that one which is not read is at least called by its name.

A file that is read by guess may still load, at a wrong strength or in part. So everything that is not plainly kohya's
format is refused here, before any tensor is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sdlora.errors import LoraFileError

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
"""What stands behind a module's name in the keys of a kohya file."""

_OTHERS: tuple[tuple[str, str], ...] = (  # pattern of a key, name of the format; the more special ones first
    (r"dora_scale|lora_magnitude_vector", "a DoRA (weight-decomposed)"),
    (r"\.hada_", "a LoHa (LyCORIS)"),
    (r"\.lokr_", "a LoKr (LyCORIS)"),
    (r"\.lora_mid\.", "a LoCon with a third, middle factor (LyCORIS, Tucker)"),
    (r"\.oft_|\.boft_", "an OFT"),
    (r"\.diff(_b)?$", "a file of full weight differences (LyCORIS, extracted)"),
    (r"\.lora_[AB]\.|\.lora_[AB]$|lora_embedding_[AB]", "a peft LoRA (lora_A, lora_B)"),
    (r"processor\..*_lora\.(down|up)\.", "an old diffusers LoRA (attention processors)"),
    (r"\.lora\.(down|up)\.weight$|_lora\.(down|up)\.weight$", "an old diffusers LoRA (lora.down, lora.up)"),
    (r"^(unet|text_encoder):\d+:(up|down)$", "a cloneofsimo LoRA (numbered layers)"),
    (r"lora_linear_layer\.", "an old diffusers LoRA (lora_linear_layer)"),
    (r"^(emb_params|clip_[lg]|<.*>|string_to_param.*)$", "a textual inversion embedding"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "a whole checkpoint"),
    (r"^(down_blocks|mid_block|encoder|decoder|text_model|transformer_blocks)\.", "a whole model, or a part of one"),
)


def require_kohya(path: Path, keys: Iterable[str]) -> list[str]:
    """Returns the names of the modules of a kohya file, in the order of their keys.

    Args:
        path: for messages.
        keys: all of the file's keys.

    Raises:
        LoraFileError: if it is in another format, which is named, or holds a key that belongs to no module.
    """
    keys = list(keys)
    if not keys:
        raise LoraFileError(f"{path} holds no tensors at all; export it again")
    for pattern, name in _OTHERS:
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise LoraFileError(
                f"{path} is {name}, which is not read yet (its key {found[:120]!r}); kohya LoRA files are read"
            )
    modules: dict[str, None] = {}
    for key in keys:
        suffix = next((s for s in (DOWN, UP, ALPHA) if key.endswith(s)), None)
        name = key.removesuffix(suffix) if suffix else ""
        if not name or "." in name:
            raise LoraFileError(
                f"{path} is no kohya LoRA: its key {key[:120]!r} is not a module name, one dot and "
                "lora_down.weight, lora_up.weight or alpha"
            )
        modules[name] = None
    return list(modules)
