"""The networks of the embedded base, and how they become a diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdlora.families.latent_spaces import LATENT_SPACES
from sdlora.families.loading import NANO
from sdlora.families.sd1 import SD1
from tools.pretrain_nano.tokenizer import VOCABULARY

WIDTH = 128
"""Width of the text states."""
CHANNELS = (48, 80, 112, 112)


def new_denoiser() -> UNet2DConditionModel:
    """Returns the denoiser with fresh weights: Stable Diffusion 1.5's blocks and names, narrower.

    `attention_head_dim` counts the heads here, as it does in Stable Diffusion 1.5's own configuration.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


def new_text_encoder() -> CLIPTextModel:
    """Returns the text encoder with fresh weights: CLIP's, with 4 layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
            pad_token_id=VOCABULARY - 1,
        )
    )


def load_autoencoder() -> AutoencoderTiny:
    """Returns the embedded base's autoencoder in fp32."""
    return AutoencoderTiny.from_pretrained(NANO / "vae", torch_dtype=torch.float32).eval()


def load_taesd() -> AutoencoderTiny:
    """Returns TAESD in fp32, as its author made it."""
    return LATENT_SPACES[SD1.vae_config["scaling_factor"]].load()


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Returns the ids of captions, (B, 77), filled up with the end of text as all programs do."""
    return tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def save_base(
    folder: Path, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, denoiser: UNet2DConditionModel
) -> None:
    """Writes a complete base in diffusers' layout, weights in fp16.

    Args:
        folder: is made; the autoencoder and the scheduler are those of the embedded base.
        tokenizer: its files are written anew.
        text_encoder: left as it is.
        denoiser: left as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() != NANO.resolve():
        for part in ("vae", "scheduler"):
            shutil.copytree(NANO / part, folder / part, dirs_exist_ok=True)
        shutil.copy(NANO / "model_index.json", folder / "model_index.json")
    tokenizer.save_pretrained(folder / "tokenizer")
    words = CLIPTextConfig(**text_encoder.config.to_dict())
    words.architectures, words.dtype = [CLIPTextModel.__name__], "float16"
    words.save_pretrained(folder / "text_encoder")
    shape = json.loads(denoiser.to_json_string())
    shape.pop("_name_or_path", None)  # where this machine keeps it is nobody's business
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "unet/config.json").write_text(json.dumps(shape, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for network, file in (
        (text_encoder, "text_encoder/model.safetensors"),
        (denoiser, "unet/diffusion_pytorch_model.safetensors"),
    ):
        weights = {key: value.detach().half().contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
