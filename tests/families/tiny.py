"""Tiny random bases of the three families, as diffusers folders: real block layouts, real tokenizers, few numbers."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig

from sdlora.families import FAMILIES
from sdlora.families.tokenizers import clip_tokenizer

SIZE = 64
"""Side in pixels of the pictures that a tiny base is made for."""

_DENOISERS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": (8, 16, 24, 24), "cross_attention_dim": 12},
    "sd2": {"block_out_channels": (8, 16, 24, 24), "cross_attention_dim": 20, "attention_head_dim": (1, 1, 1, 1)},
    "sdxl": {
        "block_out_channels": (8, 16, 24),
        "cross_attention_dim": 32,
        "attention_head_dim": (1, 1, 1),
        "transformer_layers_per_block": (1, 1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 68,  # 20 of pooled text, 6 x 8 of sizes
    },
}
_TEXT_WIDTHS = {"sd1": (12,), "sd2": (20,), "sdxl": (12, 20)}
_PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def make_tiny(
    folder: Path,
    family_name: str,
    *,
    seed: int = 1,
    layers: int = 2,
    widths: tuple[int, ...] | None = None,
    projection: int | None = None,
    unet: dict[str, Any] | None = None,
    **scheduler: Any,
) -> Path:
    """Writes a base of random weights, biases and norms included.

    Args:
        folder: it is made there.
        family_name: `sd1`, `sd2` or `sdxl`.
        seed: of the weights.
        layers: of each text encoder.
        widths: of the text encoders, where they shall be others.
        projection: width of the pooled text, where it shall be another than the encoder's.
        unet: changes of the denoiser's configuration.
        **scheduler: changes of the scheduler's configuration, e.g. prediction_type="v_prediction".
    """
    family = FAMILIES[family_name]
    changes = {"sample_size": SIZE // 8, "norm_num_groups": 8, **_DENOISERS[family_name], **(unet or {})}
    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel(**{**family.denoiser_config, **changes}),
        "vae": AutoencoderKL(**{**family.vae_config, "block_out_channels": (4, 8, 8, 8), "norm_num_groups": 4}),
    }
    config = {**family.scheduler_config, **scheduler}
    index = {"_class_name": _PIPELINES[family_name], "scheduler": ["diffusers", config["_class_name"]]}
    for spec, width in zip(family.text_encoders, widths or _TEXT_WIDTHS[family_name], strict=True):
        small = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection or width}
        counts = {"num_hidden_layers": layers, "num_attention_heads": 1}
        parts[spec.component] = spec.cls(CLIPTextConfig(**{**spec.config, **small, **counts}))
        tokenizer = spec.component.replace("text_encoder", "tokenizer")
        clip_tokenizer(spec.pad).save_pretrained(folder / tokenizer)
        index |= {tokenizer: ["transformers", "CLIPTokenizer"], spec.component: ["transformers", spec.cls.__name__]}
    random = torch.Generator().manual_seed(seed)
    for name, module in parts.items():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.data = 0.02 * noise + (parameter.data if parameter.ndim == 1 else 0.1 * noise)
        module.save_pretrained(folder / name)
        index.setdefault(name, ["diffusers", type(module).__name__])
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
