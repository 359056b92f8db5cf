"""Which family a single file is of, from the names and shapes of its weights; and what it is if it is of none."""

from __future__ import annotations

import re
from pathlib import Path

from sdlora.container import Container, open_container
from sdlora.errors import ModelError
from sdlora.families.components import require_text_to_image
from sdlora.families.layout import Component, denoiser
from sdlora.families.shapes import CONTEXT

_WANTED = "Stable Diffusion 1.x, 2.x and XL can be trained"

_OTHER_PURPOSE = (
    (r"edm_mean$", f"is Playground v2.5, whose noise schedule is another; {_WANTED}"),
    (r"^edm_vpred\.", f"is CosXL, whose noise schedule is another; {_WANTED}"),
    (r"\.time_stack\.", f"is Stable Video Diffusion, which draws moving pictures; {_WANTED}"),
    (
        r"(^|\.)(scaled_fp8|scale_weight|weight_scale|qweight|absmax|quant_map)$",
        "is quantised; give it in fp16, bf16 or fp32",
    ),
)
"""Files with a denoiser like ours that can still be no base: a key that they have, and what they are."""

_NO_DENOISER = (
    (
        r"lora_(down|up|A|B)\b|lora[._](down|up)\b|^(unet|text_encoder):\d+:|hada_w\d|lokr_w\d",
        "is a LoRA; give the base model that it was made for",
    ),
    (r"control_model\.|controlnet_|input_hint_block\.", "is a ControlNet; give a base model"),
    (r"joint_blocks\.", f"is Stable Diffusion 3; {_WANTED}"),
    (r"double_blocks\.", f"is Flux or a model like it; {_WANTED}"),
    (r"^model\.diffusion_model\.", f"is a diffusion model of another kind; {_WANTED}"),
    (
        r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.",
        "is the denoiser out of a diffusers folder; give the whole folder, the one with model_index.json in it",
    ),
    (
        r"^((first_stage_model|vae)\.)?(encoder|decoder)\.(down|up|mid|layers)",
        "is a VAE; give a base model, and this file with --vae",
    ),
    (
        r"text_model\.|^cond_stage_model\.|^conditioner\.|resblocks\.|token_embedding\.|^encoder\.(layers|block)\.",
        "holds text encoders and no denoiser; give a base model, and this file with --text-encoders",
    ),
    (r"^(emb_params|string_to_param.*|clip_[lg])$", "is a textual inversion embedding; give a base model"),
)
"""Files without one: a key that they have, and what they are; the surest sign first."""

_CONTEXTS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
"""Family by the width of the text states."""


def identify_file(path: Path) -> str:
    """Tells the family of a single file by name: `sd1`, `sd2` or `sdxl`. Reads no weights.

    Raises:
        ModelError: if it is damaged, no Stable Diffusion, or one that is not made from text alone.
    """
    return identify_container(open_container(path, "base model", ModelError))


def identify_container(container: Container) -> str:
    """Tells the family of a single file that has been opened; see `identify_file`."""
    path, unet = container.path, denoiser(container)
    if not any(name.startswith("input_blocks.") for name in unet.section):
        raise ModelError(f"{path} {_first_match(_NO_DENOISER, container) or _nothing_known(container)}")
    if what := _first_match(_OTHER_PURPOSE, container):
        raise ModelError(f"{path} {what}")
    require_text_to_image(path, unet.side("conv_in.weight", 1))
    if any(name.startswith("label_emb.") for name in unet.section):
        _require_sdxl_base(container, unet)
        return "sdxl"
    return _by_text_encoder(container) or _CONTEXTS.get(unet.side(CONTEXT, 1)) or _by_projection(unet)


def _require_sdxl_base(container: Container, unet: Component) -> None:
    """Tells SDXL's base from other models that are told more than a text: its refiner, its smaller ones, unCLIP."""
    if CONTEXT not in unet:
        raise ModelError(
            f"{container.path} is a cut-down SDXL (SSD-1B, Segmind Vega), whose blocks are others; {_WANTED}"
        )
    context = unet.side(CONTEXT, 1)
    if _has(container, "cond_stage_model.") or context == 1024:
        raise ModelError(f"{container.path} is Stable Diffusion unCLIP, which draws from pictures; {_WANTED}")
    if _has(container, "conditioner.embedders.0.model.") or context == 1280:
        raise ModelError(f"{container.path} is SDXL's refiner, which no LoRA is trained on; give the SDXL base")


def _by_text_encoder(container: Container) -> str | None:
    if _has(container, "cond_stage_model.model."):
        return "sd2"
    return "sd1" if _has(container, "cond_stage_model.transformer.") else None


def _by_projection(unet: Component) -> str:
    """Tells SD 2.x, whose transformers have linear projections, from 1.x, which has convolutions there."""
    return "sd2" if len(unet.shape("mid_block.attentions.0.proj_in.weight")) == 2 else "sd1"


def _has(container: Container, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in container.entries)


def _first_match(table: tuple[tuple[str, str], ...], container: Container) -> str | None:
    return next((what for key, what in table if any(re.search(key, name) for name in container.entries)), None)


def _nothing_known(container: Container) -> str:
    if not container.entries:
        return "holds no tensors; download or export it again"
    first = min(container.entries)
    return (
        f"is no base model: none of its {len(container.entries)} keys is known, the first is {first[:200]!r}; {_WANTED}"
    )
