"""Every spelling of a LoRA's keys, read as one: which layer a key means, and which part of its change.

A key is a component, a layer's path and an ending, and programs differ in all three. Each is a row of a table here.
What fits no row is an error that names it, for a key that is dropped is a picture that is merely wrong.

Source: `kohya-format.md`, section 3; diffusers' `utils/state_dict_utils.py`; peft's `utils/save_and_load.py`; the
generic names in ComfyUI's `comfy/lora.py`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from sdlora.container import Container, open_container
from sdlora.errors import LoraFileError
from sdlora.files.canonical import both_spellings, canonical
from sdlora.files.formats import ALPHA, DOWN, UP, refuse_others
from sdlora.files.numbered import NUMBERED, embeddings_note, numbered_modules
from sdlora.files.peft_config import CONFIG_NAME, configs_in, read_config
from sdlora.files.places import Module, Place, require_complete
from sdlora.files.webui import printable

MAX_KEY = 500
"""Longest key in letters that is read; those of real files are below 200."""

BUNDLE = "bundle_emb."
"""What begins the keys of embeddings of new words, which OneTrainer and AUTOMATIC1111's WebUI keep in LoRA files."""

_ROLES = {"down": DOWN, "A": DOWN, "up": UP, "B": UP, "alpha": ALPHA}
_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = (  # what ends a key; whose way it is
    (re.compile(r"\.lora_(down|up)\.weight\Z"), "plain"),
    (re.compile(r"\.lora_(A|B)(?:\.\w+)?\.weight\Z"), "A, B"),
    (re.compile(r"\.lora\.(down|up)\.weight\Z"), "plain"),
    (re.compile(r"(?:\.lora_linear_layer|_lora)\.(down|up)\.weight\Z"), "processors"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)?\.(alpha)\Z"), ""),
)
_KOHYA = (DOWN, UP, ALPHA, ".lora_A.weight", ".lora_B.weight")
"""Endings that stand behind kohya's names, which have no dots."""

_COMPONENTS: tuple[tuple[str, str, str], ...] = (  # what begins a key; kohya's word for it; whose way it is
    ("unet.", "lora_unet_", "diffusers"),
    ("text_encoder.", "lora_te_", "diffusers"),
    ("text_encoder_2.", "lora_te2_", "diffusers"),
    ("diffusion_model.", "lora_unet_", "comfyui"),
    ("text_encoders.clip_l.transformer.", "lora_te_", "comfyui"),
    ("text_encoders.clip_h.transformer.", "lora_te_", "comfyui"),
    ("text_encoders.clip_g.transformer.", "lora_te2_", "comfyui"),
)
_FOLDERS = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
"""Folders of an export with a peft adapter for each model."""

_PEFT = "base_model.model."
_DENOISER = re.compile(
    r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|conv_norm_out|time_embedding|add_embedding"
    r"|input_blocks|output_blocks|middle_block|time_embed|label_emb|out)\."
)
_TEXT = re.compile(r"((text_model\.)?encoder\.layers|text_projection)\.")
_PROCESSORS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""What old diffusers' processors call the layers of a text encoder's attention."""

_WORDS = {  # ways of the endings and components that occur -> what the format is called; the first that holds
    "peft": "peft",
    "processors": "diffusers (attention processors)",
    "comfyui": "comfyui",
    "A, B": "diffusers",
    "plain": "diffusers (lora.down, lora.up)",
}


@dataclass
class Found:
    """The modules of a file, or of the files of a folder, by canonical name, before any is read.

    Attributes:
        format: what the spelling is called.
        modules: by name.
        metadata: of the first file.
        containers: the files.
        notes: what is unusual, in sentences for the user.
    """

    format: str = ""
    modules: dict[str, Module] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    containers: list[Container] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_modules(path: Path) -> Found:
    """Finds the modules of a LoRA file in any dialect, from its header alone.

    Args:
        path: a file, or a folder with `adapter_model.safetensors` or `pytorch_lora_weights.safetensors`, or with a
            folder of that kind for each component.

    Raises:
        LoraFileError: if it is missing, damaged, no plain LoRA, incomplete, or has keys that belong to nothing.
    """
    found = Found()
    for file, component in _files(path):
        container = open_container(file)
        refuse_others(file, container.entries)
        if any(NUMBERED.fullmatch(key) for key in container.entries):
            modules, notes = numbered_modules(container)
            found.format = "cloneofsimo"
        else:
            modules, found.format = _spelled(container, component)
            require_complete(file, modules)
            notes = _configure(container, modules)
        for name, module in modules.items():
            _add(path, found.modules, name, module)
        words = dict.fromkeys(key.split(".")[1] for key in container.entries if key.startswith(BUNDLE))
        found.notes += [*notes, *([embeddings_note(words)] if words else [])]
        found.containers.append(container)
        found.metadata = found.metadata or dict(container.metadata)
    _rename(path, found)
    return found


def _files(path: Path) -> list[tuple[Path, str]]:
    """Returns the files that a path stands for, each with the beginning of its modules' names where it is known."""
    if not os.path.isdir(path):  # Path.is_dir raises an error for a name that is too long
        return [(path, _FOLDERS.get(path.parent.name, "") if path.name == "adapter_model.safetensors" else "")]
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (path / name).is_file():
            return [(path / name, _FOLDERS.get(path.name, "") if name.startswith("adapter") else "")]
    parts = [(path / name / "adapter_model.safetensors", start) for name, start in _FOLDERS.items()]
    there = [(file, start) for file, start in parts if file.is_file()]
    if not there:
        raise LoraFileError(
            f"{path} is a folder without adapter_model.safetensors and pytorch_lora_weights.safetensors; "
            "give the .safetensors file in it"
        )
    return there


def _spelled(container: Container, component: str) -> tuple[dict[str, Module], str]:
    """Returns modules by names in kohya's manner, and what the format is called."""
    modules: dict[str, Module] = {}
    ways: set[str] = set()
    unknown = []
    for key in container.entries:
        if key.startswith(BUNDLE):
            continue
        split = _split(key, component)
        if split is None:
            unknown.append(key)
            continue
        name, path, role, used = split
        ways |= used
        place = modules.setdefault(name, Module(path)).places.setdefault(role, Place(container, key))
        if place.key != key:
            raise _twice(container.path, name, place, Place(container, key))
    if unknown:
        raise LoraFileError(
            f"{container.path} is no LoRA that can be read: {len(unknown)} of its {len(container.entries)} keys belong "
            f"to no layer: {', '.join(repr(printable(key, 120)) for key in unknown[:3])}"
        )
    if not modules:
        raise LoraFileError(f"{container.path} holds embeddings of new words and no LoRA, and is not read")
    dotted, plain = (next((m for m in modules.values() if bool(m.path) is which), None) for which in (True, False))
    if dotted and plain:
        raise LoraFileError(
            f"{container.path} mixes the names of two programs, {_any(plain)} and {_any(dotted)}; no program loads "
            "both. Export it again"
        )
    if plain:
        return modules, "kohya (lora_A, lora_B)" if "A, B" in ways else "kohya"
    return modules, next((word for way, word in _WORDS.items() if way in ways), "diffusers")


def _split(key: str, component: str) -> tuple[str, str, str, set[str]] | None:
    """Returns a key's module name, its path, its role, and the ways of writing that it shows; `None` if unknown."""
    if len(key) > MAX_KEY or not key.isascii():
        return None
    for pattern, way in _ENDINGS:
        match = pattern.search(key)
        if match:
            stem, role = key[: match.start()], _ROLES[match[1]]
            named = _named(stem, component)
            if named:
                return named[0], named[1], role, {way, named[2]}
            return (stem, "", role, {way}) if stem and "." not in stem and match[0] in _KOHYA else None
    return None


def _named(stem: str, component: str) -> tuple[str, str, str] | None:
    """Returns a dotted stem's module name, its path in its model, and whose way it is; `None` if unknown."""
    way = ""
    if stem.startswith(_PEFT):
        stem, way = stem.removeprefix(_PEFT), "peft"
    for start, prefix, whose in _COMPONENTS:
        if stem.startswith(start):
            stem, component, way = stem.removeprefix(start), prefix, way or whose
            break
    if _DENOISER.match(stem + ".") and component in ("", "lora_unet_"):
        path = stem.replace(".processor.", ".") + (".0" if stem.endswith(".to_out") else "")
        return "lora_unet_" + path.replace(".", "_"), path, way
    if _TEXT.match(stem + ".") and component != "lora_unet_":
        front, _, last = stem.rpartition(".")
        path = f"{front}.{_PROCESSORS.get(last, last)}" if front else last
        return (component or "lora_te_") + path.replace(".", "_"), path, way
    return None


def _configure(container: Container, modules: dict[str, Module]) -> list[str]:
    """Gives modules the alpha that their file's configuration says."""
    file = container.path.with_name(CONFIG_NAME)
    peft = any(module.places[DOWN].key.startswith(_PEFT) for module in modules.values())
    if peft and not file.is_file():
        return [f"there is no {CONFIG_NAME} beside {container.path.name}, which would tell its alpha"]
    beside = read_config(file) if peft else None
    inside = configs_in(container.metadata, container.path)
    for module in modules.values():
        key = module.places[DOWN].key
        config = beside or inside.get(key.partition(".")[0]) or inside.get("")
        if config and module.path:
            module.alpha = config.alpha_of(module.path, module.shape[0])
    return []


def _rename(path: Path, found: Found) -> None:
    """Gives modules their canonical names."""
    both = both_spellings(found.modules)
    if both:
        first, second = (_any(found.modules[name]) for name in both)
        raise LoraFileError(
            f"{path} names the denoiser's layers in two ways, {first} and {second}; programs drop one half of such a "
            "file or the other. Export it again"
        )
    names = canonical({name: module.shape for name, module in found.modules.items()}, found.metadata)
    renamed: dict[str, Module] = {}
    for old, new in names.items():
        _add(path, renamed, new, found.modules[old])
    if found.format == "kohya" and any(old != new for old, new in names.items() if old.startswith("lora_unet_")):
        diffusers = any(old.startswith(("lora_unet_down_", "lora_unet_mid_", "lora_unet_up_")) for old in names)
        found.format = "kohya (diffusers names)" if diffusers else "kohya (original names)"
    found.modules = renamed


def _add(path: Path, modules: dict[str, Module], name: str, module: Module) -> None:
    known = modules.setdefault(name, module)
    if known is not module:
        raise _twice(path, name, _any(known), _any(module))


def _any(module: Module) -> Place:
    return next(iter(module.places.values()))


def _twice(path: Path, name: str, one: Place, other: Place) -> LoraFileError:
    return LoraFileError(f"{path} holds {printable(name)} twice, as {one} and as {other}; export it again")
