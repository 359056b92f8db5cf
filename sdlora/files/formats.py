"""Telling what a file with LoRA-like keys is, so that one which is not read is at least called by its name.

A file that is read by guess may still load, at a wrong strength or in part. So everything that is more, or other, than
two factors and a scale for each layer is refused here, before any tensor is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from sdlora.errors import LoraFileError
from sdlora.files.webui import printable

DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
"""What stands behind a module's name in the keys of a kohya file."""

_OTHERS: tuple[tuple[str, str], ...] = (  # pattern of a key, name of the format; the more special ones first
    (r"dora_scale|lora_magnitude_vector", "a DoRA (weight-decomposed)"),
    (r"\.hada_", "a LoHa (LyCORIS)"),
    (r"\.lokr_", "a LoKr (LyCORIS)"),
    (r"\.lora_mid\.", "a LoCon with a third, middle factor (LyCORIS, Tucker)"),
    (r"\.b?oft_", "an OFT"),
    (r"\.[ab][12]\.weight$", "a GLoRA (LyCORIS)"),
    (r"\.on_input$|\.ia3_", "an IA3"),
    (r"\.(diff(_b)?|[wb]_norm|set_weight)$", "a file of full weight differences (LyCORIS, extracted)"),
    (r"^lora_controlnet$", "a Control-LoRA"),
    (r"\.lora_[AB](\.\w+)?\.bias$|\.lora_(down|up)\.bias$", "a LoRA with biases"),
    (r"lora_embedding_[AB]", "a peft LoRA of an embedding table"),
    (
        r"modules_to_save|\.base_layer\.|^base_model\.model\.(?!.*lora_).*\.(weight|bias)$",
        "a peft file with whole layers in it",
    ),
)

_OTHER_MODELS: tuple[tuple[str, str], ...] = (  # pattern of a key, which models have such layers
    (r"^lora_unet_(double|single)_blocks_|^diffusion_model\.(double|single)_blocks\.", "Flux or a model like it"),
    (r"^(lora_)?transformer[._]|^lora_unet_joint_blocks_|^lora_te3_", "Flux, Stable Diffusion 3 or a model like them"),
    (r"^(lora_unet_|diffusion_model\.)(blocks|layers|transformer_blocks)[._]\d", "a video or transformer model"),
)

_NO_LORA: tuple[tuple[str, str], ...] = (  # the same for files that hold no factors at all
    (r"^(emb_params|clip_[lg]|<.*>|string_to_param.*)$", "a textual inversion embedding"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.", "a whole checkpoint"),
    (r"^(down_blocks|mid_block|encoder|decoder|text_model|transformer_blocks)\.", "a whole model, or a part of one"),
)

_FACTOR = r"lora_(down|up|[AB])\b|[._]lora\.(down|up)\.|lora_linear_layer\.|^(unet|text_encoder):\d+:"


def refuse_others(path: Path, keys: Iterable[str]) -> None:
    """Checks that a file may be a plain LoRA.

    Args:
        path: for messages.
        keys: all of the file's keys.

    Raises:
        LoraFileError: if there are none, or they are those of another format or model, which is named.
    """
    keys = list(keys)
    if not keys:
        raise LoraFileError(f"{path} holds no tensors at all; export it again")
    plain = any(re.search(_FACTOR, key) for key in keys)
    for pattern, name in _OTHER_MODELS if plain else ():
        found = next((key for key in keys if re.match(pattern, key)), None)
        if found is not None:
            raise LoraFileError(
                f"{path} is a LoRA for {name} (its key {printable(found, 120)!r}); read are those for Stable "
                "Diffusion 1.x, 2.x and XL"
            )
    for pattern, name in _OTHERS if plain else (*_OTHERS, *_NO_LORA):
        found = next((key for key in keys if re.search(pattern, key)), None)
        if found is not None:
            raise LoraFileError(
                f"{path} is {name}, not a plain LoRA, and is not read (its key {printable(found, 120)!r}); read are "
                "LoRA files of kohya, diffusers, peft and cloneofsimo"
            )
