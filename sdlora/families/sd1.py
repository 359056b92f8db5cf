"""Stable Diffusion 1.x: UNet2DConditionModel, one CLIP text encoder, an autoencoder that shrinks eight times.

The embedded base `nano` is of this family: same blocks and module names, narrower.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import CLIPTextModel

from sdlora.adapters import Target
from sdlora.families.family import Conditioning, Family, Parts, PictureSize, TextEncoder
from sdlora.families.latents import decode_latents, encode_images
from sdlora.families.text import encode_prompts

_ATTENTION = Target(under=("Transformer2DModel",), endings=("to_q", "to_k", "to_v", "to_out.0"))
_TRANSFORMER = Target(under=("Transformer2DModel",), kernels="1x1")
_CONVOLUTIONS = Target(under=("ResnetBlock2D", "Downsample2D", "Upsample2D"))

CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
"""The text half of OpenAI's CLIP ViT-L/14."""


def condition_sizes(sizes: Sequence[PictureSize]) -> Conditioning:
    """The denoiser is told nothing of sizes."""
    return {}


def denoise(parts: Parts, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Predicts the noise, or v, in noisy latents, (B, C, h, w), at timesteps t, (B,)."""
    return parts.denoiser(noisy, t, encoder_hidden_states=conditioning["states"], return_dict=False)[0]


def text_key(prefix: str, path: str) -> str:
    """Names a module of a text encoder as kohya's files do, by Hugging Face's old names.

    Source: `kohya-format.md`, section 3; sd-scripts' `networks/lora.py`.
    """
    path = path.removeprefix("text_model.")  # absent since transformers 5, yet every loader expects it
    inside = "" if path.startswith("text_projection") else "text_model_"
    return f"{prefix}_{inside}{path.replace('.', '_')}"


def lora_key(component: str, path: str) -> str:
    """Names a module as kohya's files do: diffusers' path of the denoiser, every dot an underscore."""
    return "lora_unet_" + path.replace(".", "_") if component == "denoiser" else text_key("lora_te", path)


SD1 = Family(
    name="sd1",
    title="Stable Diffusion 1.x",
    denoiser_config={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,  # diffusers' name for the number of heads
    },
    vae_config={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    scheduler_config={
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
    text_encoders=(
        TextEncoder(
            component="text_encoder",
            lora_prefix="lora_te",
            cls=CLIPTextModel,
            config=CLIP_L,
            pad="<|endoftext|>",
            original="cond_stage_model.transformer.",
        ),
    ),
    plain_up=(0,),
    targets={
        "attention": (_ATTENTION,),
        "attention+ff": (_TRANSFORMER,),
        "conv": (_TRANSFORMER, _CONVOLUTIONS),
    },
    text_encoder_targets=(Target(under=("CLIPAttention", "CLIPMLP")),),
    metadata={
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
    },
    v_metadata={"ss_base_model_version": "sd_v1_v"},
    encode_prompts=encode_prompts,
    condition_sizes=condition_sizes,
    denoise=denoise,
    encode_images=encode_images,
    decode_latents=decode_latents,
    lora_key=lora_key,
)
