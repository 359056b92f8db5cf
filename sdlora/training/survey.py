"""What this machine has, what of it really works, what `auto` would choose, and what to install: one report.

The report holds plain values only, so that tables, lines and JSON can be made of it and all say the same. Nothing is
downloaded or written, and a missing or broken library makes a line of advice rather than an end.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from sdlora import __version__
from sdlora.errors import SdloraError

OPTIONAL = ("xformers", "tensorboard", "peft", "bitsandbytes")
SD15_GB = 2.1  # unet, text encoder and VAE in fp16
LITTLE_DISK_GB = 5.0  # room for Stable Diffusion 1.5 and a few runs
LITTLE_MEMORY_GB = 4.0  # below it, not even fp16 weights and the program fit

Report = dict[str, Any]


def survey() -> Report:
    """Gathers the report. Touches no network and writes nothing.

    Returns:
        `versions`, `machine`, `devices`, `precision`, `attention`, `models`, `folders`, `auto`, `advice`, `can_train`;
        what could not be found out because a library is missing is an empty list.
    """
    report: Report = {"versions": _versions(), "machine": _machine(), "devices": [], "precision": [], "attention": []}
    report |= {"models": [], "folders": [], "auto": [], "advice": advice_on_versions(report["versions"])}
    report["can_train"] = False
    try:
        _try_out(report)
    except ImportError as error:
        report["advice"].append(f"a library does not load: {error}; install sdlora again in a fresh environment")
    report["advice"] += advice_on_room(report)
    return report


def _versions() -> list[Report]:
    from packaging.requirements import Requirement  # comes with huggingface-hub
    from packaging.specifiers import SpecifierSet

    try:
        ours = importlib.metadata.distribution("sdlora")
        python, libraries = ours.metadata["Requires-Python"] or "", ours.requires or []
    except importlib.metadata.PackageNotFoundError:  # run from its source, so nobody knows what it wants
        python, libraries = "", []
    rows: list[Report] = [{"name": "sdlora", "version": __version__, "wants": "", "ok": True}]
    rows.append(_row("python", platform.python_version(), SpecifierSet(python)))
    for line in libraries:
        requirement = Requirement(line)
        if requirement.marker is None:  # the others belong to extras
            rows.append(_row(requirement.name, _version(requirement.name), requirement.specifier))
    rows += [{"name": name, "version": _version(name), "wants": "optional", "ok": True} for name in OPTIONAL]
    return rows


def _row(name: str, version: str | None, wanted: Any) -> Report:
    bounds = ", ".join(sorted(map(str, wanted), reverse=True))  # ">=" before "<"
    fits = version is not None and wanted.contains(version, prereleases=True)
    return {"name": name, "version": version, "wants": bounds, "ok": fits}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Report:
    affinity = getattr(os, "sched_getaffinity", None)  # in a container, fewer cores than the machine has
    memory = None
    if _version("psutil"):  # comes with accelerate
        import psutil

        memory = round(psutil.virtual_memory().total / 1e9, 1)
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gb": memory,
    }


def _folders() -> list[Report]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from sdlora.atomic import free_space
    from sdlora.data.cache import Cache

    places = {"latents": Cache(None).folder, "downloaded models": Path(HF_HUB_CACHE), "runs": Path.cwd() / "runs"}
    rows = []
    for what, folder in places.items():
        existing, free = free_space(folder)
        writable = os.access(existing, os.W_OK)
        rows.append({"what": what, "folder": str(folder), "free_gb": round(free / 1e9, 1), "writable": writable})
    return rows


def _try_out(report: Report) -> None:
    from sdlora.training.device import DTYPES, choose_device, describe, probe
    from sdlora.training.precision import attention_backends, choose_attention, choose_precision

    report["folders"] = _folders()
    device = choose_device()
    report["devices"] = _devices()
    report["advice"] += _advice_on_drivers(device.type)
    for word, dtype in DTYPES.items():
        result = probe(device, dtype)
        milliseconds = None if result.milliseconds is None else round(result.milliseconds, 1)
        row = {"format": word, "device": str(device), "ok": result.ok, "ms": milliseconds, "error": result.error}
        report["precision"].append(row)
    report["models"] = _models()
    report["auto"] = [_automatic_base(device.type), {"what": "device", "choice": str(device), "why": describe(device)}]
    try:
        precision = choose_precision("auto", device)
        report["attention"] = [vars(backend).copy() for backend in attention_backends(device, precision.dtype)]
        attention, why = choose_attention("auto", device, precision.dtype)
    except SdloraError as error:
        report["advice"].append(str(error))
        return
    report["advice"] += [f"{row['name']}: {row['problem']}" for row in report["devices"] if row["problem"]]
    report["auto"].append({"what": "precision", "choice": precision.word, "why": precision.reason})
    report["auto"].append({"what": "attention", "choice": attention, "why": why})
    complete = all(row["ok"] for row in report["versions"] if row["version"] is None)
    report["can_train"] = complete and any(model["here"] for model in report["models"])


def _devices() -> list[Report]:
    import torch

    from sdlora.training.device import architecture_problem

    rows: list[Report] = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(i)
        row = {"device": f"cuda:{i}", "name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        row |= {"capability": f"{properties.major}.{properties.minor}"}
        rows.append(row | {"problem": architecture_problem(torch.device("cuda", i))})
    for i in range(torch.xpu.device_count() if torch.xpu.is_available() else 0):
        properties = torch.xpu.get_device_properties(i)
        row = {"device": f"xpu:{i}", "name": properties.name, "memory_gb": round(properties.total_memory / 1e9, 1)}
        rows.append(row | {"capability": None, "problem": None})
    empty = {"memory_gb": None, "capability": None, "problem": None}
    if torch.backends.mps.is_available():
        rows.append({"device": "mps", "name": "Apple GPU", **empty})
    instructions = torch.backends.cpu.get_cpu_capability()
    return [*rows, {"device": "cpu", "name": f"{torch.get_num_threads()} threads, {instructions}", **empty}]


def _models() -> list[Report]:
    from sdlora.families import hub
    from sdlora.families.loading import ALIASES, NANO

    nano = (NANO / "model_index.json").is_file()
    rows: list[Report] = [{"base": "nano", "here": nano, "where": "inside sdlora" if nano else "missing; reinstall"}]
    for alias, repository in ALIASES.items():
        folder = hub.cached(repository)
        rows.append(
            {"base": alias, "here": folder is not None, "where": str(folder or f"{repository}, not downloaded")}
        )
    return rows


def _automatic_base(device: str) -> Report:
    from sdlora.families import hub, resolve_base
    from sdlora.families.loading import ALIASES

    if device == "cuda" and hub.cached(ALIASES["sd15"]) is None:  # resolving would download it
        why = f"there is a GPU; training would first download it, once, about {SD15_GB} GB"
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            why = "there is a GPU; but HF_HUB_OFFLINE is set, so it cannot be downloaded: use --base nano, or a folder"
        return {"what": "base", "choice": "sd15", "why": why}
    base = resolve_base("auto")
    return {"what": "base", "choice": base.name, "why": base.reason}


def advice_on_versions(versions: list[Report]) -> list[str]:
    """Says what to install for each library that is missing or does not fit."""
    return [
        f"{row['name']} {_complaint(row['version'])}: pip install '{row['name']}{row['wants'].replace(' ', '')}'"
        for row in versions
        if not row["ok"]
    ]


def _complaint(version: str | None) -> str:
    return "is missing" if version is None else f"{version} does not fit"


def _advice_on_drivers(device: str) -> list[str]:
    import torch

    if device != "cpu":
        return []
    build = "choose your system and {} at pytorch.org/get-started"
    if shutil.which("nvidia-smi"):
        if torch.version.cuda is None:
            where = build.format("CUDA")
            return [f"an NVIDIA driver is installed, but torch {torch.__version__} has no CUDA; {where}"]
        return [
            f"an NVIDIA driver is installed, but torch {torch.__version__} cannot use it: update the driver for CUDA "
            f"{torch.version.cuda}, or take the build for an older CUDA: {build.format('CUDA')}"
        ]
    if Path("/dev/kfd").exists() and torch.version.hip is None:
        where = build.format("ROCm")
        return [f"there seems to be an AMD GPU, but torch {torch.__version__} has no ROCm; {where}"]
    return []


def advice_on_room(report: Report) -> list[str]:
    """Says where disk or memory is short, and how to get Stable Diffusion 1.5 if it is not here."""
    advice = []
    for row in report["folders"]:
        if not row["writable"]:
            advice.append(f"the folder for {row['what']} cannot be written: {row['folder']}")
        elif row["free_gb"] < LITTLE_DISK_GB:
            advice.append(f"only {row['free_gb']} GB free for {row['what']} in {row['folder']}")
    memory = report["machine"]["memory_gb"]
    if memory is not None and memory < LITTLE_MEMORY_GB:
        advice.append(f"only {memory} GB of memory: nano trains, Stable Diffusion 1.5 will not fit")
    bases = {model["base"]: model["here"] for model in report["models"]}
    if bases and not bases.get("sd15"):
        advice.append(
            f"for Stable Diffusion 1.5, `sdlora train --base sd15 ...` downloads about {SD15_GB} GB once; "
            "without a network, give --base a diffusers folder"
        )
    return advice
