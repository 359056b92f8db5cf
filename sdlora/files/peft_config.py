"""peft's description of an adapter: rank and alpha of every layer, and what else was done to the base model.

It stands in adapter_config.json beside a peft file, and, flattened, in the metadata of a diffusers file. The factors
alone do not tell their strength, so this is read as strictly as the factors.

Source: peft's `LoraConfig` and `get_pattern_key`; diffusers' `loaders/lora_base.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sdlora.errors import LoraFileError
from sdlora.files.webui import printable

N = TypeVar("N", int, float)

CONFIG_NAME = "adapter_config.json"
METADATA_KEY = "lora_adapter_metadata"
MAX_CONFIG = 4 * 1024 * 1024
"""Longest adapter_config.json in bytes that is read; one that lists every layer of SDXL has 0.2 MB."""

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
"""How a diffusers file's keys begin, unless it holds the layers of one model without any prefix."""

_LEVEL = "text_model."
"""A level of text encoders that transformers 5 has given up; paths and patterns may be written with it or without."""

_UNREAD: Mapping[str, str] = {  # setting that makes more of an adapter than two factors -> its name
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases",
    "modules_to_save": "whole layers that were trained",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "adapters of single parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that also change the base model, without which the factors mean nothing."""


@dataclass(frozen=True)
class AdapterConfig:
    """Rank and alpha of an adapter's layers.

    Attributes:
        source: where it was read, for messages.
        rank: of layers that no pattern names.
        alpha: of layers that no pattern names.
        rank_pattern: by the end of a layer's path: place among the patterns, rank.
        alpha_pattern: by the end of a layer's path: place among the patterns, alpha.
        rank_stabilised: whether the scale is alpha / sqrt(rank). Source: Kalajdzievski 2023, arXiv:2312.03732.
    """

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, tuple[int, float]]
    alpha_pattern: Mapping[str, tuple[int, float]]
    rank_stabilised: bool

    def alpha_of(self, path: str, rank: int) -> float:
        """Returns a layer's alpha in kohya's sense: its scale is alpha / rank.

        Args:
            path: of the layer in its model, with dots.
            rank: of its factors.

        Raises:
            LoraFileError: if another rank is said than the factors have.
        """
        said = _looked_up(self.rank_pattern, path, self.rank)
        if said != rank:
            raise LoraFileError(
                f"{self.source} says rank {said:g} for {printable(path)}, whose factors have rank {rank}; one of them "
                "was changed, and with it the strength of the LoRA. Export it again"
            )
        alpha = _looked_up(self.alpha_pattern, path, self.alpha)
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def _looked_up(patterns: Mapping[str, tuple[int, float]], path: str, usual: float) -> float:
    """Returns the value of the first pattern that names the path, as `^path` or by its last components."""
    path = path.removeprefix(_LEVEL)
    parts = path.split(".")
    names = [f"^{path}", *(".".join(parts[i:]) for i in range(len(parts)))]
    found = [patterns[name] for name in names if name in patterns]
    return min(found)[1] if found else usual


def _ordered(patterns: Mapping[str, float]) -> dict[str, tuple[int, float]]:
    """Returns patterns in one spelling, each with its place in the order in which peft tries them."""
    ordered: dict[str, tuple[int, float]] = {}
    for place, (pattern, value) in enumerate(patterns.items()):
        start = "^" if pattern.startswith("^") else ""
        end = pattern.removeprefix("^").replace("\\.", ".").removeprefix(_LEVEL)
        ordered.setdefault(start + end, (place, value))
    return ordered


def read_config(path: Path) -> AdapterConfig:
    """Reads an adapter_config.json.

    Raises:
        LoraFileError: if it cannot be read, or describes more than a plain LoRA.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG + 1)
    except OSError as error:
        raise LoraFileError(f"cannot read {path}: {error.strerror or error}") from error
    if len(raw) > MAX_CONFIG:
        raise LoraFileError(f"{path} is longer than {MAX_CONFIG} bytes; it is no adapter's configuration")
    return parse_config(_parsed(raw, str(path)), str(path))


def configs_in(metadata: Mapping[str, str], path: Path) -> dict[str, AdapterConfig]:
    """Returns the configurations in a diffusers file's metadata, by component: `unet`, `text_encoder`, or "".

    Raises:
        LoraFileError: if they cannot be read, or describe more than a plain LoRA.
    """
    if METADATA_KEY not in metadata:
        return {}
    source = f"{METADATA_KEY} in the metadata of {path}"
    table = _parsed(metadata[METADATA_KEY], source)
    found = {c: dict(_below(table, f"{c}.")) for c in _COMPONENTS} | ({"": table} if "r" in table else {})
    return {component: parse_config(settings, source) for component, settings in found.items() if settings}


def _below(table: Mapping[str, Any], start: str) -> Iterator[tuple[str, Any]]:
    return ((key.removeprefix(start), value) for key, value in table.items() if key.startswith(start))


def _parsed(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraFileError(f"cannot read {source}: {error}; export the LoRA again") from error
    if not isinstance(table, dict):
        raise LoraFileError(f"cannot read {source}: it is no table; export the LoRA again")
    return table


def parse_config(table: Mapping[str, Any], source: str) -> AdapterConfig:
    """Checks a configuration and returns what of it matters.

    Args:
        table: peft's settings by name.
        source: for messages.

    Raises:
        LoraFileError: if it describes more than a plain LoRA, or holds values of the wrong kind.
    """
    _require_plain(table, source)
    rank, alpha = table.get("r", 8), table.get("lora_alpha", 8)
    if not _is_number(rank) or not _is_number(alpha):
        raise LoraFileError(f"{source} says r = {rank!r:.50}, lora_alpha = {alpha!r:.50}; both must be numbers")
    patterns = {}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns[name] = table.get(name) or {}
        if not isinstance(patterns[name], dict) or not all(map(_is_number, patterns[name].values())):
            raise LoraFileError(f"{source}: {name} must give a number for each name of a layer")
        odd = next((key for key in patterns[name] if not re.fullmatch(r"\^?(\w|-|\\?\.)+", key)), None)
        if odd is not None:
            raise LoraFileError(
                f"{source}: {name} has {printable(odd, 80)!r}, a regular expression; only names of layers are read"
            )
    rank_pattern, alpha_pattern = (_ordered(patterns[name]) for name in ("rank_pattern", "alpha_pattern"))
    return AdapterConfig(source, rank, float(alpha), rank_pattern, alpha_pattern, bool(table.get("use_rslora")))


def _require_plain(table: Mapping[str, Any], source: str) -> None:
    kind = table.get("peft_type") or "LORA"
    if kind != "LORA":
        raise LoraFileError(f"{source} describes a {printable(str(kind), 40)}, not a plain LoRA, and is not read")
    for setting, name in _UNREAD.items():
        if table.get(setting):
            raise LoraFileError(f"{source} has {setting}: {name}, not a plain LoRA, and is not read")
    if table.get("bias") not in (None, "none"):
        raise LoraFileError(f"{source} has bias = {table['bias']!r:.40}: trained biases, not a plain LoRA, not read")
    start = table.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise LoraFileError(
            f"{source} has init_lora_weights = {printable(start, 40)!r}, which also changed the base model; convert it "
            "to a plain LoRA with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e30 < value < 1e30


def config_table(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Returns peft's settings for an adapter whose layers may differ in rank and alpha.

    Args:
        ranks: by the layer's path in its model.
        alphas: by the same paths; the scale is alpha / rank.
    """
    rank, alpha = _usual(ranks.values()), _usual(alphas.values())
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _short(alpha),
        "rank_pattern": {path: value for path, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {path: _short(value) for path, value in sorted(alphas.items()) if value != alpha},
        "target_modules": sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _usual(values: Iterable[N]) -> N:
    """Returns the value that occurs most often; of several the largest, so that it does not depend on the order."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _short(value: float) -> int | float:
    return int(value) if value == int(value) else value
