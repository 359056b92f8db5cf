"""A diffusers folder becomes one file in the original layout, tensor by tensor: the inverse of `single.py`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.atomic import replacing
from sdlora.container import Container, Entry, write_stream
from sdlora.errors import ModelError
from sdlora.families.components import folder_resolution, identify_folder
from sdlora.families.facts import V_MARKER, ZERO_SNR_MARKER
from sdlora.families.family import Family
from sdlora.families.folders import read_json
from sdlora.families.layout import (
    DENOISER,
    VAE,
    Source,
    Sources,
    components,
    denoiser_sources,
    text_sources,
    vae_sources,
)
from sdlora.families.names import OLD_VAE_ATTENTION
from sdlora.families.places import component_weights
from sdlora.families.shapes import denoiser_config, text_encoder_config, vae_config
from sdlora.families.table import FAMILIES


@dataclass(frozen=True)
class _Piece:
    """One weight of the folder: its file, its key there, and where in the original layout it goes."""

    container: Container
    key: str
    source: Source


def save_single(folder: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a base model as a single file; loaded back it is equal, bit by bit.

    Args:
        folder: a diffusers folder.
        target: the .safetensors file.
        dtype: number format of the weights; `None` keeps each as it is stored.

    Raises:
        ModelError: if the folder is damaged, or is something that a single file cannot tell.
        TrainingError: if the file cannot be written.
    """
    family = FAMILIES[identify_folder(folder)]
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    plan = _plan(folder, family)
    shapes = {key: (dtype or _stored(pieces[0]).dtype, _shape(key, pieces)) for key, pieces in plan.items()}
    _require_tellable(folder, family, {key: Entry(*shape, 0, 0) for key, shape in shapes.items()})
    shapes |= {marker: (torch.float32, (0,)) for marker in _markers(scheduler)}

    def tensor(key: str) -> Tensor:
        return _joined(plan[key]).reshape(shapes[key][1]).to(shapes[key][0]) if key in plan else torch.empty(0)

    with replacing(target) as temporary:
        write_stream(temporary, shapes, _metadata(folder, target, family, scheduler), tensor)


def _plan(folder: Path, family: Family) -> dict[str, list[_Piece]]:
    """Says which weights of the folder go under which key, those of one key in order."""
    plan: dict[str, list[_Piece]] = {}
    for part, prefix, weights, sources in _parts(folder, family):
        for key, container in weights.items():
            if key.endswith("position_ids"):
                continue  # 0, 1, 2, ...; older transformers stored them
            source = sources(key)
            if source is None:
                raise ModelError(f"{folder / part}: the original layout has no place for {key[:200]!r}")
            plan.setdefault(prefix + source.name, []).append(_Piece(container, key, source))
    return {key: sorted(pieces, key=lambda piece: piece.source.third or 0) for key, pieces in plan.items()}


def _parts(folder: Path, family: Family) -> Iterator[tuple[str, str, dict[str, Container], Sources]]:
    """Yields each component's folder, prefix, weights, and where they go."""
    unet = component_weights(folder / "unet")
    plain_up = [i for i in range(4) if f"up_blocks.{i}.attentions.0.norm.weight" not in unet]
    yield "unet", DENOISER, unet, denoiser_sources(plain_up)
    kind = read_json(folder / "vae" / "config.json").get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise ModelError(f"{folder / 'vae'} is a {kind}, for which the original layout has no names; replace it first")
    vae = component_weights(folder / "vae")
    sources = vae_sources(sum(f"decoder.up_blocks.{i}.resnets.0.conv1.weight" in vae for i in range(9)))
    yield "vae", VAE, vae, lambda key: sources(re.sub(r"(?<=\.attentions\.0\.)\w+", _today, key))
    for spec in family.text_encoders:
        prefix = spec.original + ("" if spec.open_clip else "text_model.")
        yield spec.component, prefix, component_weights(folder / spec.component), text_sources(spec)


def _today(word: re.Match[str]) -> str:
    return OLD_VAE_ATTENTION.get(word[0], word[0])


def _stored(piece: _Piece) -> Entry:
    return piece.container.entries[piece.key]


def _shape(key: str, pieces: list[_Piece]) -> tuple[int, ...]:
    shape = _stored(pieces[0]).shape
    if pieces[0].source.third is not None:
        shape = (sum(_stored(piece).shape[0] for piece in pieces), *shape[1:])
    if len(shape) == 2 and re.search(r"\.mid\.attn_1\.\w+\.weight$", key):
        return (*shape, 1, 1)  # the VAE's attention is of convolutions there
    return shape[::-1] if pieces[0].source.transposed else shape


def _joined(pieces: list[_Piece]) -> Tensor:
    whole = torch.cat([piece.container.read(piece.key) for piece in pieces])
    return whole.T if pieces[0].source.transposed else whole


def _markers(scheduler: dict[str, Any]) -> list[str]:
    markers = {V_MARKER: scheduler.get("prediction_type") == "v_prediction"}
    markers[ZERO_SNR_MARKER] = bool(scheduler.get("rescale_betas_zero_snr"))
    return [marker for marker, holds in markers.items() if holds]


def _metadata(folder: Path, target: Path, family: Family, scheduler: dict[str, Any]) -> dict[str, str]:
    """Returns the facts that loaders go by. Source: Stability's ModelSpec 1.0.1."""
    prediction = scheduler.get("prediction_type", "epsilon")
    facts = family.facts(prediction)
    resolution = folder_resolution(folder)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": facts["modelspec.architecture"].removesuffix("/lora"),
        "modelspec.implementation": facts["modelspec.implementation"],
        "modelspec.title": target.stem,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }


_UNTOLD = {
    "unet": ("attention_head_dim", "norm_num_groups", "transformer_layers_per_block", "addition_time_embed_dim"),
    "vae": ("norm_num_groups", "scaling_factor"),
    "text_encoder": ("num_attention_heads", "hidden_act"),
    "text_encoder_2": ("num_attention_heads", "hidden_act"),
    "scheduler": ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"),
}
"""Settings that no single file tells, by part: whoever loads one goes by the family."""


def _require_tellable(folder: Path, family: Family, planned: dict[str, Entry]) -> None:
    """Checks that what will be assumed of the file to be is what the folder says."""
    found = components(Container(folder, planned, {}, 0, ModelError), family)
    assumed = {
        "unet": denoiser_config(found, family, folder_resolution(folder)),
        "vae": vae_config(found["vae"], family),
        "scheduler": family.scheduler_config,
        **{s.component: text_encoder_config(found[s.component], s) for s in family.text_encoders},
    }
    for part, values in assumed.items():
        said = read_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"))
        for key in _UNTOLD[part]:
            if key in values and key in said and _each(said[key], values[key]) != _each(values[key], said[key]):
                raise ModelError(
                    f"{folder / part} has {key} {said[key]}, which a single file cannot tell: whoever loads it takes "
                    f"{values[key]}"
                )


def _each(value: Any, other: Any) -> Any:
    """Spreads one number for all levels over as many as the other value has."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value] * len(other) if isinstance(other, (list, tuple)) else value
