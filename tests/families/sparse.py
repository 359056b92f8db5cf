"""Bases of full size that take no room: true headers, and behind them a hole in the file where the weights would be."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from sdlora.families import FAMILIES
from sdlora.families.full_size import full_size_models


def write_sparse(
    path: Path, shapes: Mapping[str, tuple[Any, tuple[int, ...]]], metadata: Any = None, tensor: Any = None
) -> None:
    """Stands in for `container.write_stream`: every weight is of one byte a number, and all are holes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    position = 0
    for key, (_, shape) in shapes.items():
        end = position + math.prod(shape)
        table[key] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(table).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + position)


def make_full_size(folder: Path, family_name: str) -> Path:
    """Writes the headers and configurations of a diffusers folder."""
    family = FAMILIES[family_name]
    models = full_size_models(family)
    with torch.device("meta"):
        models["vae"] = AutoencoderKL(**family.vae_config)
    models["unet"] = models.pop("denoiser")
    configs = {"unet": family.denoiser_config, "vae": family.vae_config, "scheduler": family.scheduler_config}
    configs |= {spec.component: spec.config for spec in family.text_encoders}
    for name, config in configs.items():
        (folder / name).mkdir(parents=True)
        (folder / name / ("scheduler_config.json" if name == "scheduler" else "config.json")).write_text(
            json.dumps(config)
        )
    for name, module in models.items():
        flat = name.startswith("text_encoder") and not hasattr(module, "text_model")
        shapes = {("text_model." if flat else "") + k: (None, tuple(t.shape)) for k, t in module.state_dict().items()}
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        write_sparse(folder / name / f"{stem}.safetensors", shapes)
    index = {name: ["", ""] for name in (*models, "scheduler")}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
