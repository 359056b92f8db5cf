"""What a LoRA that was made from other files says about itself: where it comes from, and nothing that became false.

Rank, alpha, hashes and title of the sources are not those of the result. How they were trained is kept of one source;
of several, what is equal in all. No date is added: equal input gives an equal file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdlora import __version__
from sdlora.files.attach import looks_like
from sdlora.files.canonical import FAMILY_OF

if TYPE_CHECKING:
    from pathlib import Path

    from sdlora.files.kohya import LoraFile, ModuleWeights
    from sdlora.files.merge import Weighed

_SUPERSEDED = re.compile(
    r"ss_network_(module|dim|alpha|args)|ss_output_name|sshs_\w+|modelspec\.(title|hash_sha256|merged_from)"
    r"|sdlora_(version|merged|resized)|lora_adapter_metadata"  # the last is diffusers' own: ranks and alphas again
)
_KIND = ("ss_base_model_version", "ss_v2", "modelspec.architecture", "modelspec.implementation")
"""What programs tell the kind of a LoRA by."""

_JOINED = ("modelspec.trigger_phrase", "modelspec.author", "modelspec.license", "modelspec.tags")
"""Of these, what any source says is kept: each goes on calling its part, and its maker's terms go on holding."""


def merged_metadata(sources: Sequence[Weighed], modules: Mapping[str, ModuleWeights], name: str) -> dict[str, str]:
    """Returns the metadata of several LoRAs in one, hashes excepted.

    Args:
        sources: what was merged.
        modules: the result.
        name: stem of the file to be.
    """
    first, *others = (source.lora.metadata for source in sources)
    values = {key: text for key, text in first.items() if all(other.get(key) == text for other in others)}
    for key in _JOINED:
        if said := _distinct(sources, key):
            values[key] = ", ".join(said)
    values |= _kind(sources)
    names = ", ".join(source.lora.path.absolute().name for source in sources)
    changes = {"sdlora_merged": json.dumps(origins(sources)), "modelspec.merged_from": names}
    return _finished(values, modules, name, changes)


def origins(sources: Sequence[Weighed]) -> list[dict[str, Any]]:
    """Returns the `sdlora_merged` table: name, strength and tensors' hash of every source."""
    return [
        {
            "file": source.lora.path.absolute().name,
            "strength": source.strength,
            "sshs_model_hash": source.lora.model_hash,
        }
        for source in sources
    ]


def _distinct(sources: Sequence[Weighed], key: str) -> list[str]:
    said = (source.lora.metadata.get(key, "") for source in sources)
    return list(dict.fromkeys(text for text in said if text not in ("", "None")))


def _kind(sources: Sequence[Weighed]) -> dict[str, str]:
    """Returns the facts that loaders go by: as the sources say them if they agree, else as their family has them."""
    said = {key: _distinct(sources, key) for key in _KIND}
    if all(len(texts) == 1 for texts in said.values()):
        return {key: texts[0] for key, texts in said.items()}
    from sdlora.families import FAMILIES  # not before it is needed, for it brings all of diffusers along

    kinds = [looks_like(source.lora) for source in sources]
    family = next((FAMILIES[FAMILY_OF[kind]] for kind in kinds if kind in FAMILY_OF), None)
    facts = family.facts("epsilon") if family else {}
    return {**facts, **{key: texts[0] for key, texts in said.items() if len(texts) == 1}}


def resized_metadata(lora: LoraFile, modules: Mapping[str, ModuleWeights], rule: str, name: str) -> dict[str, str]:
    """Returns the metadata of a LoRA that was cut to another rank, hashes excepted.

    Args:
        lora: what it was cut from.
        modules: the result.
        rule: how the rank was found, e.g. energy 0.95.
        name: stem of the file to be.
    """
    origin = {"file": lora.path.absolute().name, "sshs_model_hash": lora.model_hash, "kept": rule}
    return _finished(lora.metadata, modules, name, {"sdlora_resized": json.dumps(origin)})


def extracted_metadata(
    facts: Mapping[str, str], base: Path, tuned: Path, modules: Mapping[str, ModuleWeights], name: str
) -> dict[str, str]:
    """Returns the metadata of a LoRA that was taken out of two checkpoints, hashes excepted.

    Args:
        facts: of their kind, see `Family.facts`.
        base: the checkpoint that the LoRA will be put on.
        tuned: the checkpoint that it imitates.
        modules: the result.
        name: stem of the file to be.
    """
    names = {"base": base.absolute().name, "tuned": tuned.absolute().name}
    values = {**facts, "modelspec.sai_model_spec": "1.0.1", "ss_sd_model_name": names["base"]}
    return _finished(values, modules, name, {"sdlora_extracted": json.dumps(names)})


def _finished(
    kept: Mapping[str, str], modules: Mapping[str, ModuleWeights], name: str, changes: Mapping[str, str]
) -> dict[str, str]:
    name = name.lstrip("{")  # the WebUI would parse it as JSON and then fail to show it
    values = {
        **{key: text for key, text in kept.items() if not _SUPERSEDED.fullmatch(key)},
        "ss_network_module": "networks.lora",
        "ss_network_dim": common({weights.rank for weights in modules.values()}),
        "ss_network_alpha": common({weights.alpha for weights in modules.values()}),
        "ss_output_name": name,
        "modelspec.title": name,
        "sdlora_version": __version__,
        **changes,
    }
    return {writable(key): writable(text) for key, text in values.items()}


def common(values: set[Any]) -> str:
    """Writes a number that all modules share; else the word of sd-scripts' `resize_lora.py`."""
    return str(values.pop()) if len(values) == 1 else "Dynamic"


def writable(text: str) -> str:
    """Replaces what UTF-8 cannot say: halves of surrogate pairs, which JSON can bring in."""
    return text.encode("utf-8", "replace").decode("utf-8")
