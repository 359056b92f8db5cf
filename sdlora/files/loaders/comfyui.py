"""ComfyUI: a table of every name that a layer may have; what is not in it is logged and passed over.

Source: ComfyUI 0.3.64 at commit a125cd8, `comfy/lora.py`, `comfy/utils.py` (`unet_to_diffusers`) and
`comfy/weight_adapter/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sdlora.files.loaders.contents import LYCORIS, PAIRS, Contents
from sdlora.files.loaders.layout import Layout, Place, flat, same_product
from sdlora.files.loaders.report import Factors, Report, make_report

PROGRAM, VERSION = "ComfyUI", "0.3.64 (a125cd8)"

ENCODERS = {("text_encoder", False): "clip_l", ("text_encoder", True): "clip_h", ("text_encoder_2", True): "clip_g"}
"""What ComfyUI and Forge call a text encoder, by our component's name and whether it is OpenCLIP's."""

_FULL = {"clip_l": "lora_te1_text_projection", "clip_g": "lora_te2_text_projection"}
_PARTS = (
    *(part for pair in PAIRS for part in pair),
    *(".lora_A", ".lora_B", ".lora_A.default.weight", ".lora_B.default.weight"),
    *(".alpha", ".lora_mid.weight", ".dora_scale", ".reshape_weight", ".set_weight"),
    *(".oft_blocks", ".rescale"),
    *LYCORIS,
)
_HALVES = (*PAIRS, (".lora_A", ".lora_B"), (".lora_A.default.weight", ".lora_B.default.weight"))


def read(layout: Layout, contents: Contents) -> Report:
    """Returns what ComfyUI makes of a file."""
    names = dict(denoiser_names(layout))
    for section, component, path in encoder_paths(layout):
        names |= dict.fromkeys(encoder_names(section, path), (component, path))
        names[f"text_encoders.{section}.transformer.text_model.{path}"] = (component, path)
    for section, component in sections(layout).items():
        if section in _FULL:  # ComfyUI's own CLIP has this layer, even where the checkpoint has not
            names[_FULL[section]] = (component, "text_projection")
    found = match(contents, names, _PARTS, _HALVES)
    return make_report(
        PROGRAM,
        VERSION,
        layout,
        contents,
        left=found.left,
        factors=found.factors,
        fits=same_product,
        misfit="logs an error for each module that does not fit, and draws without it",
        refusal=found.refusal,
        notes=['logs "lora key not loaded" for each key that is left, and draws without it'] if found.left else [],
    )


def denoiser_names(layout: Layout) -> Iterator[tuple[str, Place]]:
    """Yields the names of the denoiser's layers, in both spellings, under kohya's and diffusers' prefixes."""
    for path, original in layout.originals.items():
        place = ("denoiser", path)
        yield f"lora_unet_{flat(original)}", place
        yield f"diffusion_model.{original}", place
        yield f"lora_unet_{flat(path)}", place
        yield f"lycoris_{flat(path)}", place
        processor = path.replace(".to_", ".processor.to_")
        processor = processor.removesuffix(".0") if processor.endswith(".to_out.0") else processor
        yield processor, place
        yield f"unet.{processor}", place


def sections(layout: Layout) -> dict[str, str]:
    """Returns the components of the text encoders by ComfyUI's names."""
    return {ENCODERS[e.component, e.open_clip]: e.component for e in layout.family.text_encoders}


def encoder_paths(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Yields ComfyUI's name of the encoder, the component and the path of each layer of its transformer."""
    for section, component in sections(layout).items():
        for path in layout.components.get(component, {}):
            if path.startswith("encoder.layers."):
                yield section, component, path


def encoder_names(section: str, path: str) -> Iterator[str]:
    """Yields the names of a text encoder's layer: kohya's of one encoder, of two, and diffusers'."""
    for number, dotted in [("2", "text_encoder_2")] if section == "clip_g" else [("", "text_encoder"), ("1", "")]:
        yield f"lora_te{number}_text_model_{flat(path)}"
        if dotted:
            yield f"{dotted}.text_model.{path}"


@dataclass(frozen=True)
class Match:
    """Keys without a place, factors with one, and why the program stops, if it does."""

    left: list[str]
    factors: list[Factors]
    refusal: str | None


def match(
    contents: Contents, names: Mapping[str, Place], parts: Sequence[str], halves: Sequence[tuple[str, str]]
) -> Match:
    """Looks every key up as a name followed by one of the known parts.

    Args:
        contents: the file.
        names: places by name.
        parts: what may stand behind a name.
        halves: which of them are a factor next to the input, and the one next to the output.
    """
    found: dict[str, set[str]] = {}
    left = []
    for key in contents.shapes:
        part = next((p for p in parts if key.endswith(p) and key.removesuffix(p) in names), None)
        if part is None:
            left.append(key)
        else:
            found.setdefault(key.removesuffix(part), set()).add(part)
    factors, refusal = [], None
    for name, there in found.items():
        for down, up in halves:
            if down in there and up in there:
                if ".lora_mid.weight" in there:
                    continue  # a third factor: no plain product
                shapes = contents.shapes[name + down], contents.shapes[name + up]
                factors.append(Factors(name, names[name], *shapes))
            elif up in there:
                refusal = refusal or f"it stops at {name + up}, whose other half is missing"
            elif down in there:
                left.append(name + down)
    return Match(left, factors, refusal)
