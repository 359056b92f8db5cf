"""Stable Diffusion 1.x: UNet2DConditionModel, one CLIP text encoder, an autoencoder that shrinks eight times.

The embedded base `nano` is of this family: same blocks and module names, narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sdlora.adapters import Target
from sdlora.diffusion.schedule import Schedule
from sdlora.errors import ModelError
from sdlora.families.family import Conditioning, Family, Parts
from sdlora.families.folders import load_component, read_json

_ATTENTION = Target(under=("Transformer2DModel",), endings=("to_q", "to_k", "to_v", "to_out.0"))
_TRANSFORMER = Target(under=("Transformer2DModel",), kernels="1x1")
_CONVOLUTIONS = Target(under=("ResnetBlock2D", "Downsample2D", "Upsample2D"))


VAE_FACTOR = 8
"""Pixels per latent."""


def native_resolution(folder: Path) -> int:
    """Returns the side in pixels that a checkpoint was trained on, from its configuration alone.

    Raises:
        ModelError: if the configuration is missing or damaged.
    """
    size = read_json(folder / "unet" / "config.json").get("sample_size", 64)
    return (size if isinstance(size, int) else max(size)) * VAE_FACTOR


def load(folder: Path, prediction: str) -> Parts:
    """Loads a diffusers folder in fp32 on the CPU.

    Args:
        folder: holds `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`.
        prediction: "auto" reads the checkpoint's scheduler; else "epsilon" or "v_prediction".

    Raises:
        ModelError: if a part is missing or damaged.
    """
    vae_class: Any = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}.get(
        read_json(folder / "vae" / "config.json").get("_class_name", "AutoencoderKL")
    )
    if vae_class is None:
        raise ModelError(f"{folder / 'vae'} is not an AutoencoderKL or AutoencoderTiny, which SD 1.x has")
    denoiser = load_component(UNet2DConditionModel, folder, "unet")
    vae = load_component(vae_class, folder, "vae")
    encoder = load_component(CLIPTextModel, folder, "text_encoder")
    tokenizer = load_component(CLIPTokenizer, folder, "tokenizer")
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        schedule = Schedule.from_config(scheduler_config, prediction)
    except ValueError as error:
        raise ModelError(f"{folder / 'scheduler'}: {error}") from error
    scheduler_config = {**scheduler_config, "prediction_type": schedule.prediction}
    vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if vae_factor != VAE_FACTOR:
        raise ModelError(
            f"{folder / 'vae'} shrinks pictures {vae_factor} times; SD 1.x shrinks them {VAE_FACTOR} times"
        )
    return Parts(
        family=SD1,
        name=folder.name,
        denoiser=denoiser.requires_grad_(False).eval(),
        vae=vae.requires_grad_(False).eval(),
        text_encoders={"text_encoder": encoder.requires_grad_(False).eval()},
        tokenizers={"text_encoder": tokenizer},
        schedule=schedule,
        scheduler_config=scheduler_config,
        resolution=native_resolution(folder),
        vae_factor=VAE_FACTOR,
    )


def encode_prompts(parts: Parts, texts: Sequence[str], clip_skip: int = 1) -> Conditioning:
    """Encodes texts into `states`, (B, 77, D).

    Args:
        parts: the base.
        texts: B prompts; what lies beyond 75 tokens is not seen.
        clip_skip: 1 takes the last layer, n the n-th from the end; both through the final layer norm.

    Raises:
        ModelError: if the encoder has fewer layers.

    Source: sd-scripts' `get_hidden_states`, AUTOMATIC1111's "Clip skip".
    """
    encoder: Any = parts.text_encoders["text_encoder"]
    tokenizer = parts.tokenizers["text_encoder"]
    layers = encoder.config.num_hidden_layers
    if clip_skip > layers:
        raise ModelError(f"clip skip {clip_skip} is too deep: the text encoder of {parts.name} has {layers} layers")
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    )
    output = encoder(tokens.input_ids.to(next(encoder.parameters()).device), output_hidden_states=clip_skip > 1)
    if clip_skip == 1:
        return {"states": output.last_hidden_state}
    model: Any = getattr(encoder, "text_model", encoder)  # transformers 5 has no such level any more
    return {"states": model.final_layer_norm(output.hidden_states[-clip_skip])}


def denoise(parts: Parts, noisy: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """Predicts the noise, or v, in noisy latents, (B, C, h, w), at timesteps t, (B,)."""
    return parts.denoiser(noisy, t, encoder_hidden_states=conditioning["states"], return_dict=False)[0]


def encode_images(parts: Parts, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encodes pixels, (B, 3, H, W) in [-1, 1], into the mean and deviation of scaled latents, (B, C, H/8, W/8)."""
    vae: Any = parts.vae
    scale = vae.config.scaling_factor
    encoded = vae.encode(pixels.to(next(vae.parameters()).dtype))
    if hasattr(encoded, "latents"):  # TAESD draws no sample
        return encoded.latents * scale, None
    return encoded.latent_dist.mean * scale, encoded.latent_dist.std * scale


def decode_latents(parts: Parts, latents: Tensor) -> Tensor:
    """Decodes scaled latents, (B, C, h, w), into pixels, (B, 3, 8h, 8w), in [-1, 1]."""
    vae: Any = parts.vae
    latents = latents.to(next(vae.parameters()).dtype) / vae.config.scaling_factor
    return vae.decode(latents).sample.clamp(-1, 1)


def lora_key(component: str, path: str) -> str:
    """Names a module as kohya's files do: every dot an underscore, Hugging Face's old names for the text encoder.

    Source: `kohya-format.md`, section 3; sd-scripts' `networks/lora.py`.
    """
    if component == "denoiser":
        return "lora_unet_" + path.replace(".", "_")
    path = path.removeprefix("text_model.")  # absent since transformers 5, yet every loader expects it
    return "lora_te_text_model_" + path.replace(".", "_")


def pipeline(parts: Parts, scheduler: Any) -> Any:
    """Builds a diffusers pipeline around these very modules, adapters included."""
    pipe = StableDiffusionPipeline(
        vae=parts.vae,  # type: ignore[arg-type]
        text_encoder=parts.text_encoders["text_encoder"],  # type: ignore[arg-type]
        tokenizer=parts.tokenizers["text_encoder"],
        unet=parts.denoiser,  # type: ignore[arg-type]
        scheduler=scheduler,
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


SD1 = Family(
    name="sd1",
    denoiser_width=1280,
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
    native_resolution=native_resolution,
    load=load,
    encode_prompts=encode_prompts,
    denoise=denoise,
    encode_images=encode_images,
    decode_latents=decode_latents,
    lora_key=lora_key,
    pipeline=pipeline,
)
