"""Putting a LoRA where a program looks for it, together with the files that carry its trigger word and its picture.

Which program lies in a folder is told by what is in it. Nothing that is there already is lost without being asked.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdlora.atomic import replacing
from sdlora.errors import LoraFileError


@dataclass(frozen=True)
class Program:
    """A program that reads LoRA files from a folder of its own.

    Attributes:
        name: as in `sdlora.files.loaders.LOADERS`.
        marks: the program is there if all paths of one of these groups exist in its folder.
        folder: where it looks for LoRA files; `None` if they must be given to it by hand.
        call: how a LoRA is used there; `{alias}`, `{stem}` and `{trigger}` are filled in.
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    folder: str | None
    call: str


_WEBUI_CALL = "In a prompt: <lora:{alias}:1> {trigger}"

PROGRAMS = (
    Program("InvokeAI", (("invokeai.yaml",), ("databases/invokeai.db",)), None, ""),
    Program(
        "ComfyUI",
        (("comfy",), ("models/checkpoints", "models/loras")),
        "models/loras",
        'Choose {stem} in a "Load LoRA" node; in a prompt: {trigger}',
    ),
    Program("Forge", (("modules_forge",),), "models/Lora", _WEBUI_CALL),
    Program("AUTOMATIC1111", (("models/Stable-diffusion",), ("webui.py",), ("launch.py",)), "models/Lora", _WEBUI_CALL),
)
"""In the order in which they are looked for: Forge has all that AUTOMATIC1111 has, and more."""

SIDECARS = (".json", ".png")
"""Files beside a LoRA that belong to it, by what stands behind its name."""


@dataclass(frozen=True)
class Installed:
    """What `install` did.

    Attributes:
        program: found at the path.
        folder: where the files are now.
        written: the files that were copied.
        unchanged: files that were there already, byte for byte the same.
    """

    program: Program
    folder: Path
    written: tuple[Path, ...]
    unchanged: tuple[Path, ...]


def install(file: Path, webui: Path, force: bool = False) -> Installed:
    """Copies a LoRA file and its side files into a program's folder, each whole or not at all.

    Args:
        file: the LoRA file.
        webui: folder of the program, or the one right above it.
        force: whether to replace files of these names that hold something else.

    Raises:
        LoraFileError: if no program is found at the path, or a different file has one of the names.
        TrainingError: if the disk is full or the folder cannot be written.
    """
    if file.suffix.lower() != ".safetensors":
        raise LoraFileError(f"{file} would not be listed: programs look for .safetensors files; rename it first")
    program, root = find_program(webui)
    folder = root / (program.folder or "")
    sources = [file, *(file.with_suffix(suffix) for suffix in SIDECARS if file.with_suffix(suffix).is_file())]
    targets = {source: folder / source.name for source in sources}
    same = {source for source, target in targets.items() if _same(source, target)}
    taken = [target for source, target in targets.items() if source not in same and target.exists()]
    if taken and not force:
        names = " and ".join(target.name for target in taken)
        raise LoraFileError(
            f"{folder} has another {names} already; rename yours, or replace what is there with --force"
        )
    for source, target in targets.items():
        if source not in same:
            with replacing(target) as temporary:
                shutil.copyfile(source, temporary)
    return Installed(
        program,
        folder,
        written=tuple(target for source, target in targets.items() if source not in same),
        unchanged=tuple(targets[source] for source in sources if source in same),
    )


def find_program(path: Path) -> tuple[Program, Path]:
    """Tells which program lies at a path, and in which folder.

    Args:
        path: the program's folder, the one above it, or the folder in it where LoRA files are kept.

    Raises:
        LoraFileError: if there is none, or one that wants to be given files by hand.
    """
    if not path.is_dir():
        raise LoraFileError(f"{path} is no folder; give the one that the program is installed in")
    found = _at(path) or _around(path) or _inside(path)
    if found is None:
        names = ", ".join(program.name for program in PROGRAMS if program.folder)
        raise LoraFileError(f"found none of {names} in {path}; give the folder that has `models` in it")
    program, root = found
    if program.folder is None:
        raise LoraFileError(
            f"{root} is a folder of {program.name}, which keeps its models in a database; open its Model Manager, "
            "choose Add Models and give it the path of the LoRA file"
        )
    return program, root


def call(installed: Installed, alias: str, stem: str, trigger: str) -> str:
    """Returns how the LoRA is used in the program, one line."""
    fields: Mapping[str, str] = {"alias": alias, "stem": stem, "trigger": trigger or "(it has no trigger word)"}
    return installed.program.call.format_map(fields)


def _at(root: Path) -> tuple[Program, Path] | None:
    for program in PROGRAMS:
        if any(all((root / mark).exists() for mark in group) for group in program.marks):
            return program, root
    return None


def _around(path: Path) -> tuple[Program, Path] | None:
    """Finds a program by the folder in it where it keeps LoRA files."""
    inner = path.resolve()
    found = _at(inner.parent.parent)
    return found if found and found[0].folder and (found[1] / found[0].folder).resolve() == inner else None


def _inside(path: Path) -> tuple[Program, Path] | None:
    """Finds the one program right below a folder, as portable packages have it."""
    try:
        entries = sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError as error:
        raise LoraFileError(f"cannot look into {path}: {error.strerror or error}") from error
    found = [program for entry in entries if (program := _at(entry))]
    if len(found) > 1:
        raise LoraFileError(f"{path} has {' and '.join(root.name for _, root in found)} in it; give the one you mean")
    return found[0] if found else None


def _same(source: Path, target: Path) -> bool:
    try:
        return (
            target.is_file()
            and target.stat().st_size == source.stat().st_size
            and target.read_bytes() == source.read_bytes()
        )
    except OSError as error:
        raise LoraFileError(f"cannot compare {source} with {target}: {error.strerror or error}") from error
