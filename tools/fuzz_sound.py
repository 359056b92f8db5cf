"""Small sound files of each kind that sdlora reads, and what is done with each: what `fuzz_files` damages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sdlora.cli import inspect, lora_check
from sdlora.container import serialize
from sdlora.families import FAMILIES, identify, native_resolution
from sdlora.families.places import places
from sdlora.families.replacements import replace_text_encoders, replace_vae
from sdlora.files.kohya import read_lora
from sdlora.files.loaders import certificate, layout_for
from sdlora.files.peft_config import CONFIG_NAME

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sound:
    """A sound file.

    Attributes:
        content: its bytes.
        read: does with a file all that sdlora would.
        beside: texts of the JSON files that must lie beside it, by name.
    """

    content: bytes
    read: Callable[[Path], object]
    beside: Mapping[str, str] = field(default_factory=dict)


def sound_files() -> dict[str, Sound]:
    """Returns sound files by the name of their kind."""
    training = {"ss_base_model_version": "sd_v1", "ss_tag_frequency": '{"a": {"b": 1}}', "ss_output_name": "style"}
    inside = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.alpha_pattern": {}})}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": {"to_k": 3}}
    config |= {"use_rslora": False, "bias": "none", "init_lora_weights": True, "modules_to_save": None}
    sides = {"up": (768, 1), "down": (1, 768)}
    numbered: Shapes = {f"text_encoder:{n}:{side}": shape for n in range(48) for side, shape in sides.items()}
    half, single = torch.float16, torch.float32
    return {
        "kohya": Sound(_file(_kohya(), half, training), _check_lora),
        "kohya, XL": Sound(_file(_kohya_xl(), half, {}), _check_lora),
        "diffusers": Sound(_file(_diffusers(), half, inside), _check_lora),
        "peft": Sound(_file(_peft(), single, {}), _read_lora, {CONFIG_NAME: json.dumps(config)}),
        "attention processors": Sound(_file(_processors(), single, {}), _check_lora),
        "cloneofsimo": Sound(_file(numbered, half, {"text_encoder": '["CLIPAttention"]'}), _read_lora),
        "checkpoint": Sound(_file(_checkpoint(), half, {"modelspec.prediction_type": "v"}), _read_checkpoint),
        "VAE": Sound(serialize(_vae(), {}), lambda path: replace_vae(str(path), FAMILIES["sd1"])),
        "text encoder": Sound(
            serialize(_encoder(), {}), lambda path: replace_text_encoders(str(path), FAMILIES["sd1"])
        ),
    }


def _file(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    rng = torch.Generator().manual_seed(0)
    return serialize({key: torch.randn(shape, generator=rng).to(dtype) for key, shape in shapes.items()}, metadata)


def _dotted() -> list[str]:
    return [f"down_blocks.{n % 3}.attentions.0.transformer_blocks.0.attn{1 + n % 2}" for n in range(4)]


def _factors(name: str, out: int, in_: int) -> Shapes:
    return {f"{name}.lora_down.weight": (4, in_), f"{name}.lora_up.weight": (out, 4), f"{name}.alpha": ()}


def _kohya() -> Shapes:
    shapes: Shapes = {}
    for path in _dotted():
        shapes |= _factors(f"lora_unet_{path.replace('.', '_')}_to_k", 320, 768)
    return shapes


def _kohya_xl() -> Shapes:
    conv = "lora_unet_input_blocks_1_0_in_layers_2"
    return {
        **_factors("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 640, 2048),
        **_factors("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", 768, 768),
        **_factors("lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280),
        f"{conv}.lora_down.weight": (2, 320, 3, 3),
        f"{conv}.lora_up.weight": (320, 2, 1, 1),
    }


def _diffusers() -> Shapes:
    shapes: Shapes = {}
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    for stem, out in [*((f"unet.{path}.to_k", 320) for path in _dotted()), (encoder, 768)]:
        shapes |= {f"{stem}.lora_A.weight": (4, 768), f"{stem}.lora_B.weight": (out, 4)}
    return shapes


def _peft() -> Shapes:
    shapes: Shapes = {}
    for path in _dotted():
        stem = f"base_model.model.{path}.to_k"
        shapes |= {f"{stem}.lora_A.weight": (4, 768), f"{stem}.lora_B.weight": (320, 4)}
    return shapes


def _processors() -> Shapes:
    shapes: Shapes = {}
    for path in _dotted():
        stem = f"{path}.processor.to_k_lora"
        shapes |= {f"{stem}.down.weight": (4, 768), f"{stem}.up.weight": (320, 4)}
    return shapes


def _checkpoint() -> Shapes:
    return {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": (8, 8, 1, 1),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (8, 768),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.norm1.weight": (8,),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    }


def _vae() -> dict[str, torch.Tensor]:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        "block_out_channels": (32,) * 4,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    model = AutoencoderKL(**blocks, layers_per_block=2, latent_channels=4)
    return {key: value.half() for key, value in model.state_dict().items()}


def _encoder() -> dict[str, torch.Tensor]:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    model = CLIPTextModel(
        CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1)
    )
    prefix = "cond_stage_model.transformer.text_model."
    return {prefix + key.removeprefix("text_model."): value.half() for key, value in model.state_dict().items()}


def _read_lora(path: Path) -> None:
    _require_harmless(inspect.plain(inspect.describe(read_lora(path))))


def _check_lora(path: Path) -> None:
    """Asks what five programs make of the keys, even of a file that is then refused."""
    for family in ("sd1", "sdxl"):
        _require_harmless(lora_check.plain(certificate(path, layout_for(family))))
    _read_lora(path)


def _read_checkpoint(path: Path) -> None:
    identify(path)
    native_resolution(path)
    places(path)


def _require_harmless(shown: str) -> None:
    odd = [c for c in shown if not (c.isprintable() or c == "\n")]
    if odd:
        raise AssertionError(f"a terminal would be sent {odd[0]!r}")
