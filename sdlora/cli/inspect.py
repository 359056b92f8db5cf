"""`sdlora inspect`: what a LoRA file holds, and what other programs will make of it, without loading any model.

The report is gathered as plain values first, so that the lines and the JSON say the same. Texts from the file are a
stranger's: they are shown on one line, without control characters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sdlora.files.kohya import LoraFile, ModuleWeights

Report = dict[str, Any]

STRONGEST = 5
"""How many modules of each component are listed."""

_COMPONENTS = {  # prefix of a module's name -> component; te1 and te2 before te
    "lora_unet_": "denoiser",
    "lora_te1_": "text encoder 1",
    "lora_te2_": "text encoder 2",
    "lora_te_": "text encoder",
}

_TRAINING = {  # what is shown of the training -> key
    "steps": "ss_steps",
    "epoch": "ss_epoch",
    "pictures in an epoch": "ss_num_train_images",
    "resolution": "ss_resolution",
    "learning rate": "ss_learning_rate",
    "clip skip": "ss_clip_skip",
    "made with": "ss_network_module",
}


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def command(file: Path, as_json: bool) -> None:
    """Show what a LoRA file holds and what other programs will make of it.

    Every value is read and checked; a damaged file, or one in a format that is not read, is refused with the reason.
    """
    from sdlora.files.kohya import read_lora

    report = describe(read_lora(file))
    click.echo(json.dumps(report, indent=2) if as_json else plain(report))


def describe(lora: LoraFile) -> Report:
    """Gathers the report on a LoRA file: plain values, texts as they stand in the file."""
    from sdlora.files.attach import looks_like
    from sdlora.files.kohya import DTYPE_WORDS
    from sdlora.files.sidecars import activation_text
    from sdlora.files.webui import a1111_version, forge_version

    metadata = lora.metadata
    stored = metadata.get("sshs_model_hash")
    report: Report = {
        "file": str(lora.path),
        "bytes": sum(f.stat().st_size for f in [lora.path, *lora.path.rglob("*.safetensors")] if f.is_file()),
        "format": f"{lora.format} LoRA, safetensors",
        "dtype": DTYPE_WORDS[lora.dtype],
        "looks_like": looks_like(lora),
        "base_version": metadata.get("ss_base_model_version"),
        "base": metadata.get("sdlora_base") or metadata.get("ss_sd_model_name"),
        "trigger": activation_text(lora),
        "name": lora.path.stem,
        "alias": metadata.get("ss_output_name") or lora.path.stem,
        "a1111": a1111_version(metadata),
        "forge": forge_version(metadata),
        "hash": {"computed": lora.model_hash, "stored": stored, "matches": stored == lora.model_hash},
        "training": {what: metadata[key] for what, key in _TRAINING.items() if metadata.get(key, "None") != "None"},
        "components": _components(lora.modules),
    }
    return {**report, "notes": [*lora.notes, *_notes(report)], "metadata": dict(metadata)}


def _components(modules: dict[str, ModuleWeights]) -> dict[str, Report]:
    grouped: dict[str, dict[str, ModuleWeights]] = {}
    for name, weights in modules.items():
        component = next((c for prefix, c in _COMPONENTS.items() if name.startswith(prefix)), "other")
        grouped.setdefault(component, {})[name] = weights
    reports = {}
    for component, members in grouped.items():
        norms = {name: weights.norm for name, weights in members.items()}
        strongest = sorted(norms, key=lambda name: -norms[name])[:STRONGEST]
        reports[component] = {
            "modules": len(members),
            "ranks": sorted({w.rank for w in members.values()}),
            "alphas": sorted({w.alpha for w in members.values()}),
            "scales": sorted({w.scale for w in members.values()}),
            "norm": math.hypot(*norms.values()),
            "strongest": {name: norms[name] for name in strongest},
        }
    return reports


def _notes(report: Report) -> list[str]:
    """Says what may surprise its owner in other programs."""
    from sdlora.files.canonical import FAMILY_OF

    family = FAMILY_OF.get(report["looks_like"], "").upper()
    notes = []
    for program, version in (("AUTOMATIC1111", report["a1111"]), ("Forge", report["forge"])):
        if family and version not in (family, "Unknown"):
            notes.append(f"{program} takes it for {version} and hides it while a model of another kind is loaded")
        elif family and version == "Unknown":
            notes.append(f"{program} cannot tell its kind from the metadata; it is listed as Unknown")
    if report["hash"]["stored"] and not report["hash"]["matches"]:
        notes.append("sshs_model_hash is not that of its tensors: they were changed after training, or are damaged")
    if report["alias"] != report["name"]:
        notes.append(f"the WebUI calls it {report['alias']}, its name in training, unless set to use file names")
    if report["dtype"] == "bf16":
        notes.append("bf16 cannot be read by some older programs; fp16 can be read by all")
    return notes


def plain(report: Report) -> str:
    """Returns the report as aligned lines."""
    from sdlora.files.attach import NAMES

    base = [NAMES[report["looks_like"]]]
    base += [report[key] for key in ("base_version", "base") if report[key] not in (None, "", "None")]
    digest = report["hash"]
    state = "matches the tensors" if digest["matches"] else "does NOT match the tensors"
    rows = [
        ("File", f"{report['file']}  ({report['bytes'] / 1e6:.2f} MB)"),
        ("Format", f"{report['format']}, {report['dtype']}"),
        ("Made for", ", ".join(dict.fromkeys(base))),
        ("Trigger", report["trigger"] or "none given"),
        ("In a prompt", f"<lora:{report['alias']}:1>"),
        ("Listed as", f"{report['a1111']} in AUTOMATIC1111, {report['forge']} in Forge"),
        ("Hash", f"{digest['computed'][:12]}, " + (f"sshs_model_hash {state}" if digest["stored"] else "none stored")),
        *((what.capitalize(), text) for what, text in report["training"].items()),
    ]
    lines = [_row(name, text) for name, text in rows]
    for component, facts in report["components"].items():
        lines += ["", *_component(component, facts)]
    if report["notes"]:
        lines += ["", "Notes", *(f"  {_safe(note)}" for note in report["notes"])]
    return "\n".join(lines)


def _component(component: str, facts: Report) -> list[str]:
    scales = f"rank {_span(facts['ranks'])}, alpha {_span(facts['alphas'])}, scale {_span(facts['scales'])}"
    lines = [
        f"{component.capitalize()}: {facts['modules']} modules, {scales}",
        f"  norm of the change {facts['norm']:.4g}; the strongest:",
    ]
    return lines + [f"  {norm:10.4g}  {_safe(name)}" for name, norm in facts["strongest"].items()]


def _span(values: list[float]) -> str:
    if len(values) > 3:
        return f"{values[0]:g} to {values[-1]:g}"
    return " or ".join(f"{value:g}" for value in values)


def _row(name: str, text: str) -> str:
    return f"{name + ':':<22}{_safe(text)}"


def _safe(text: str) -> str:
    from sdlora.files.webui import printable

    return printable(text)
