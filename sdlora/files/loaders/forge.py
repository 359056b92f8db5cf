"""Forge: ComfyUI's table of names, but a file with more than a dozen keys outside of it is not used at all.

Source: stable-diffusion-webui-forge at commit dfdcbab, `packages_3rdparty/comfyui_lora_collection/lora.py`,
`extensions-builtin/sd_forge_lora/networks.py` and `backend/patcher/lora.py`.
"""

from __future__ import annotations

from sdlora.files.loaders.comfyui import denoiser_names, encoder_names, encoder_paths, match, sections
from sdlora.files.loaders.contents import LYCORIS, PAIRS, Contents
from sdlora.files.loaders.layout import Layout, same_product
from sdlora.files.loaders.report import Report, make_report
from sdlora.files.webui import forge_version, listing_notes

PROGRAM, VERSION = "Forge", "dfdcbab"

MAX_UNMATCHED = 12
"""Keys without a place up to which Forge still uses a file."""

_FULL = {
    "clip_l": ("lora_te1_text_projection",),
    "clip_g": ("lora_te2_text_projection", "text_encoder.text_projection"),
}
_PARTS = (
    *(part for pair in PAIRS for part in pair),
    *(".alpha", ".lora_mid.weight", ".dora_scale", ".set_weight"),
    *LYCORIS,
)


def read(layout: Layout, contents: Contents) -> Report:
    """Returns what Forge makes of a file."""
    names = dict(denoiser_names(layout))
    for section, component, path in encoder_paths(layout):
        names |= dict.fromkeys(encoder_names(section, path), (component, path))
    for section, component in sections(layout).items():  # Forge gives every CLIP such a layer
        names |= dict.fromkeys(_FULL.get(section, ()), (component, "text_projection"))
    found = match(contents, names, _PARTS, PAIRS)
    refusal = found.refusal
    if len(found.left) > MAX_UNMATCHED:
        refusal = (
            f'"LoRA version mismatch": {len(found.left)} keys have no place, and more than {MAX_UNMATCHED} are too many'
        )
    kind = forge_version(contents.metadata)
    return make_report(
        PROGRAM,
        VERSION,
        layout,
        contents,
        left=found.left,
        factors=found.factors,
        fits=same_product,
        misfit="stops drawing at a module that does not fit, or pads it and spoils the picture",
        kind=kind,
        refusal=refusal,
        notes=listing_notes(kind, layout.kind),
    )
