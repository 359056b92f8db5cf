"""What a single file says of itself besides weights: what the denoiser predicts, at which noise, for which size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sdlora.container import Container
from sdlora.families.components import VAE_FACTOR
from sdlora.families.family import Family
from sdlora.families.layout import Component

V_MARKER, ZERO_SNR_MARKER = "v_pred", "ztsnr"
"""Keys of empty tensors by which ComfyUI and its followers mark a v-prediction and a zero terminal SNR checkpoint."""

_WORDS = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}
"""What `modelspec.prediction_type` says -> diffusers' word for it."""

_TELLTALES = {"sd2": ("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias", 0.09)}
"""By family: a weight that spreads wider than the number if v is predicted. Source: ComfyUI, `SD20.model_type`."""

_V_RESOLUTIONS = {"sd2": 768}
"""Side in pixels that the v-predicting checkpoints of a family were trained on, where it is another than the usual."""


@dataclass(frozen=True)
class Facts:
    """What a file says of itself.

    Attributes:
        scheduler_config: noise schedule and prediction type, in diffusers' words.
        resolution: side in pixels of the square pictures that it was trained on.
        notes: how that was told, where it is not the family's default; a sentence each.
    """

    scheduler_config: dict[str, Any]
    resolution: int
    notes: list[str]


def read_facts(container: Container, denoiser: Component, family: Family) -> Facts:
    """Reads the facts; touches no weights but, in families that need it, one small one.

    Raises:
        ModelError: if the file cannot be read.
    """
    config: dict[str, Any] = dict(family.scheduler_config)
    notes = []
    prediction, sign = _prediction(container, denoiser, family)
    if prediction != config["prediction_type"]:
        config["prediction_type"] = prediction
        notes.append(f"{container.path.name} predicts {prediction}, told by {sign}; --prediction overrules it")
    if ZERO_SNR_MARKER in container.entries:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        notes.append(
            f"{container.path.name} ends in pure noise (zero terminal SNR), told by its key {ZERO_SNR_MARKER}; "
            "--zero-snr overrules it"
        )
    usual: int = family.denoiser_config["sample_size"] * VAE_FACTOR
    if prediction == "v_prediction":
        usual = _V_RESOLUTIONS.get(family.name, usual)
    return Facts(config, _resolution(container) or usual, notes)


def _prediction(container: Container, denoiser: Component, family: Family) -> tuple[str, str]:
    """Returns what the denoiser predicts, and the sign by which that was told."""
    if V_MARKER in container.entries:
        return "v_prediction", f"its key {V_MARKER}"
    word = container.metadata.get("modelspec.prediction_type", "").lower()
    if word in _WORDS:
        return _WORDS[word], "its metadata"
    weight, limit = _TELLTALES.get(family.name, ("", 0.0))
    if weight in denoiser:
        spread = container.read(denoiser.key(weight)).float().std(correction=0).item()
        if spread > limit:
            return "v_prediction", f"the spread of one of its biases, as ComfyUI does ({spread:.3f}, above {limit})"
    return family.scheduler_config["prediction_type"], "default"


def _resolution(container: Container) -> int | None:
    """Returns the side of the square that the metadata names, if it is one that a denoiser could be trained on."""
    sides = re.fullmatch(r"(\d{2,4})x(\d{2,4})", container.metadata.get("modelspec.resolution", ""))
    if sides is None or sides[1] != sides[2] or int(sides[1]) % VAE_FACTOR:
        return None
    return int(sides[1])
