"""Stable Diffusion XL: two text encoders side by side, a pooled text, and a denoiser that is told a picture's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdlora.families.family import Conditioning, Parts, PictureSize, TextEncoder
from sdlora.families.names import original_unet
from sdlora.families.sd1 import CLIP_L, SD1, text_key

OPEN_CLIP_BIG_G = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def condition_sizes(sizes: Sequence[PictureSize]) -> Conditioning:
    """Tells the denoiser the sizes of B pictures: `sizes`, (B, 6), in pixels, in the order that it learned.

    Source: Podell et al. 2023, arXiv:2307.01952, sections 2.2 and 2.3; diffusers' `_get_add_time_ids`.
    """
    return {"sizes": torch.tensor([(*size.original, *size.crop, *size.target) for size in sizes], dtype=torch.float32)}


def denoise(parts: Parts, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Predicts the noise, or v, in noisy latents, (B, C, h, w), at timesteps t, (B,).

    Where the conditioning has no `sizes`, the picture counts as one that was never cropped or resized.
    """
    sizes = conditioning.get("sizes")
    if sizes is None:
        side = (noisy.shape[-2] * parts.vae_factor, noisy.shape[-1] * parts.vae_factor)
        sizes = condition_sizes([PictureSize(side, (0, 0), side)] * len(noisy))["sizes"]
    added = {"text_embeds": conditioning["pooled"], "time_ids": sizes.to(noisy.device)}
    states = conditioning["states"]
    return parts.denoiser(noisy, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False)[0]


def lora_key(component: str, path: str) -> str:
    """Names a module as kohya's files do: the denoiser by its original name, every dot an underscore."""
    if component == "denoiser":
        return "lora_unet_" + (original_unet(path) or path).replace(".", "_")
    return text_key({e.component: e.lora_prefix for e in SDXL.text_encoders}[component], path)


SDXL = replace(
    SD1,
    name="sdxl",
    title="Stable Diffusion XL",
    denoiser_config={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
        "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),  # heads, of 64 channels each
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae_config={**SD1.vae_config, "sample_size": 1024, "scaling_factor": 0.13025},
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            lora_prefix="lora_te1",
            cls=CLIPTextModel,
            config=CLIP_L,
            layer=2,
            normed=False,
            pad="<|endoftext|>",
            original="conditioner.embedders.0.transformer.",
        ),
        TextEncoder(
            component="text_encoder_2",
            lora_prefix="lora_te2",
            cls=CLIPTextModelWithProjection,
            config=OPEN_CLIP_BIG_G,
            layer=2,
            normed=False,
            pooled=True,
            pad="!",
            original="conditioner.embedders.1.model.",
            open_clip=True,
        ),
    ),
    plain_up=(2,),
    metadata={
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    },
    v_metadata={"ss_base_model_version": "sdxl_base_v1-0"},
    condition_sizes=condition_sizes,
    denoise=denoise,
    lora_key=lora_key,
)
