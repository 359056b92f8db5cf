"""Stable Diffusion 2.x: the denoiser of 1.x with linear projections, and the text half of OpenCLIP's ViT-H.

The 512 px base predicts epsilon, the 768 px one v; which it is, the checkpoint says.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import CLIPTextModel

from sdlora.families.family import TextEncoder
from sdlora.families.sd1 import CLIP_L, SD1

OPEN_CLIP_H = {
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 1024,
    "num_hidden_layers": 23,  # of 24: the denoiser sees the last but one, and diffusers leaves the last out
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}

SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    denoiser_config={
        **SD1.denoiser_config,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),  # heads, of 64 channels each
        "use_linear_projection": True,
        "upcast_attention": True,  # without it fp16 overflows
    },
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            lora_prefix="lora_te",
            cls=CLIPTextModel,
            config=OPEN_CLIP_H,
            pad="!",
            original="cond_stage_model.model.",
            open_clip=True,
        ),
    ),
    metadata={
        "ss_base_model_version": "sd_v2",
        "ss_v2": "True",
        "modelspec.architecture": "stable-diffusion-v2-512/lora",
        "modelspec.implementation": "diffusers",
    },
    v_metadata={
        "ss_base_model_version": "sd_v2_v",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
    },
)
