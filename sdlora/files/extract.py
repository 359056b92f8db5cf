"""What a checkpoint learned beyond another, as a LoRA: layer by layer, the best approximation of the difference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdlora.errors import ModelError
from sdlora.families import Family
from sdlora.families.components import folder_resolution
from sdlora.families.facts import read_facts
from sdlora.families.folders import read_json
from sdlora.families.layout import denoiser
from sdlora.files.difference import DENOISER, TEXT, Pair, open_pair
from sdlora.files.kohya import ModuleWeights
from sdlora.files.resize import Cut, module
from sdlora.files.svd import Keep, of_change


@dataclass(frozen=True)
class Extracted:
    """A LoRA that was taken out of two checkpoints.

    Attributes:
        family: of both.
        facts: what loaders tell its kind by, for the file's metadata.
        modules: by name; layers without a difference have none.
        cuts: what is kept of each difference, by the same names.
        unchanged: number of layers without a difference.
        notes: what the LoRA does not hold, a sentence each.
    """

    family: Family
    facts: dict[str, str]
    modules: dict[str, ModuleWeights]
    cuts: dict[str, Cut]
    unchanged: int
    notes: tuple[str, ...]


def extract(
    base: Path,
    tuned: Path,
    keep: Keep,
    dtype: torch.dtype,
    *,
    start: int = 32,
    text_encoder: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extracted:
    """Returns the LoRA that turns one checkpoint into the other, as well as its rank allows.

    Differences are taken in fp32, one layer at a time; see `difference.is_rounding` for what counts as none. Equal
    input gives an equal result.

    Args:
        base: the checkpoint that the LoRA will be put on: a .safetensors file or a diffusers folder.
        tuned: the one that it shall imitate; of the same family.
        keep: finds the rank of a layer; see `sdlora.files.svd.RULES`.
        dtype: number format of the file to be.
        start: how many directions are looked for first; the rank, where it is known.
        text_encoder: whether the text encoders are looked at too.
        progress: told after each layer how many of how many are done.

    Raises:
        ModelError: if one is damaged or quantised, they do not fit together, or nothing differs.
    """
    pair = open_pair(base, tuned)
    names = pair.layers(DENOISER, TEXT) if text_encoder else pair.layers(DENOISER)
    if text_encoder and not any(map(TEXT.fullmatch, names)):
        raise ModelError(f"{base} and {tuned} hold no text encoder; leave --text-encoder out")
    modules, cuts = {}, {}
    for done, name in enumerate(names, start=1):
        change = pair.difference(name)
        if change is not None:
            spectrum = of_change(change, keep, start, name)
            rank = keep(spectrum.s, spectrum.total)
            modules[name] = module(spectrum, rank, pair.before[name].shape[1:], dtype)
            cuts[name] = Cut(min(change.shape), rank, spectrum.total, spectrum.carried(rank))
        progress(done, len(names))
    if not modules:
        raise ModelError(
            f"{tuned} does not differ from {base} in any of the {len(names)} layers that were compared; "
            + ("there is nothing to extract" if text_encoder else "if only its text encoder was tuned: --text-encoder")
        )
    facts, notes = _facts(pair)
    notes += _not_held(pair, names, text_encoder)
    return Extracted(pair.family, facts, modules, cuts, len(names) - len(modules), tuple(notes))


def _facts(pair: Pair) -> tuple[dict[str, str], list[str]]:
    """Returns what loaders tell the kind by, and a note if the two checkpoints do not predict the same."""
    prediction, resolution = _trained(pair, pair.tuned)
    before, _ = _trained(pair, pair.base)
    notes = []
    if before != prediction:
        notes.append(
            f"{pair.base} predicts {before} and {pair.tuned} {prediction}; a LoRA hardly turns one into the other"
        )
    return {
        **pair.family.facts(prediction),
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }, notes


def _trained(pair: Pair, path: Path) -> tuple[str, int]:
    """Returns what one of a pair predicts, and the side in pixels of the pictures that it was trained on."""
    if path in pair.containers:  # a single file; of a folder, the files in it are
        facts = read_facts(pair.containers[path], denoiser(pair.containers[path]), pair.family)
        return str(facts.scheduler_config["prediction_type"]), facts.resolution
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    return str(scheduler.get("prediction_type", "epsilon")), folder_resolution(path)


def _not_held(pair: Pair, names: list[str], text_encoder: bool) -> list[str]:
    notes = []
    if not text_encoder:
        shared = [n for n in pair.before if TEXT.fullmatch(n) and n in pair.after]
        fitting = [n for n in shared if pair.before[n].shape == pair.after[n].shape]
        if len(fitting) < len(shared) or any(pair.difference(name) is not None for name in fitting):
            notes.append("the text encoders differ too; --text-encoder extracts them")
    if others := pair.other_differences(names):
        notes.append(
            f"{others} other tensors differ too (biases, norms, embeddings, both ends); a LoRA holds none of them"
        )
    return notes
