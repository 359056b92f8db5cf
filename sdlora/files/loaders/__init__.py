"""The certificate: what five programs will make of a LoRA file, found by their own rules before a user finds out.

Each program looks for the layers under names of its own and passes over what it does not know, most often in silence.
Here their rules are written out as pure functions: names and shapes in, a report out.

Source: `kohya-format.md`, sections 3 to 5; each program's file names the version that was read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdlora.atomic import write_text
from sdlora.container import open_container
from sdlora.errors import LoraFileError
from sdlora.files.loaders import a1111, comfyui, diffusers_rules, forge, invokeai
from sdlora.files.loaders.contents import Contents, contents_of
from sdlora.files.loaders.layout import Layout, layout_for, layout_of
from sdlora.files.loaders.report import Report

__all__ = [
    "LOADERS",
    "Contents",
    "Layout",
    "Report",
    "certificate",
    "contents_of",
    "examine",
    "layout_for",
    "layout_of",
    "require_loadable",
    "write_certificate",
]

LOADERS: dict[str, Callable[[Layout, Contents], Report]] = {
    a1111.PROGRAM: a1111.read,
    forge.PROGRAM: forge.read,
    comfyui.PROGRAM: comfyui.read,
    diffusers_rules.PROGRAM: diffusers_rules.read,
    invokeai.PROGRAM: invokeai.read,
}
"""The programs' rules, by name."""


def examine(layout: Layout, contents: Contents) -> list[Report]:
    """Returns what each program makes of a file, in the order of `LOADERS`."""
    return [read(layout, contents) for read in LOADERS.values()]


def certificate(path: Path, layout: Layout) -> dict[str, Any]:
    """Returns what the programs make of a file, ready for JSON.

    Args:
        path: the file; its raw keys are what counts.
        layout: of the base that it is for.

    Returns:
        `file`, `sha256`, `keys`, `base`, `notes`, `losses`, and for each of `programs`: `program`, `version`,
        `consumed`, `left`, `misfits`, `misscaled`, `class`, `loads`, `verdict`, `notes`.

    Raises:
        LoraFileError: if the file is damaged.
    """
    contents = contents_of(open_container(path))
    reports = examine(layout, contents)
    notes = ["bf16 cannot be read by some older programs, those through numpy; fp16 can be read by all"]
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "keys": len(contents.shapes),
        "base": {"family": layout.family.name, "title": layout.family.title, "text_width": layout.text_width},
        "notes": notes if contents.bf16 else [],
        "losses": [loss for report in reports for loss in report.losses()],
        "programs": [_row(report) for report in reports],
    }


def write_certificate(path: Path, layout: Layout) -> Path:
    """Writes what the programs make of a file as `certificate.json` beside it; see `certificate`.

    Returns:
        The file written.

    Raises:
        LoraFileError: if the LoRA file is damaged.
        TrainingError: if the disk is full or the folder cannot be written.
    """
    target = path.with_name("certificate.json")
    write_text(target, json.dumps(certificate(path, layout), indent=2, ensure_ascii=False) + "\n")
    return target


def _row(report: Report) -> dict[str, Any]:
    return {
        "program": report.program,
        "version": report.version,
        "consumed": report.consumed,
        "left": list(report.left),
        "misfits": list(report.misfits),
        "misscaled": list(report.misscaled),
        "class": report.kind,
        "loads": report.loads,
        "verdict": report.verdict,
        "notes": [*([report.refusal] if report.refusal else []), *report.notes],
    }


def require_loadable(found: Mapping[str, Any]) -> None:
    """Refuses a file of which some program would lose something; for files that we write.

    Args:
        found: what `certificate` returned.

    Raises:
        LoraFileError: naming the program and the key.
    """
    if found["losses"]:
        more = len(found["losses"]) - 1
        raise LoraFileError(
            f"{found['file']} failed its check: {found['losses'][0]}"
            + (f" ({more} more such findings)" if more else "")
            + "; the file was written wrong, please report this"
        )
