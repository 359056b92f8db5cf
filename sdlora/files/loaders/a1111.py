"""AUTOMATIC1111's WebUI: names are turned into those of the original program, and looked up among its modules.

OpenCLIP's text encoders (SD 2.x, SDXL's second) keep query, key and value in one matrix. Their LoRA is applied only if
all four projections of a layer are in the file; if one is missing, the other three are passed over in silence.

Source: stable-diffusion-webui 1.10.1 at commit 82a973c, `extensions-builtin/Lora/networks.py` and `network_lora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from sdlora.families.names import open_clip
from sdlora.files.loaders.contents import LYCORIS, Contents, key_of
from sdlora.files.loaders.layout import Layout, Place, Shape, flat, same_product
from sdlora.files.loaders.report import Factors, Report, make_report
from sdlora.files.webui import a1111_version, listing_notes

PROGRAM, VERSION = "AUTOMATIC1111", "1.10.1 (82a973c)"

_HALVES = (("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight"))
_TYPES = frozenset(part[1:] for part in LYCORIS) | {"weight", "on_input", "oft_blocks"}
_EXTRAS = frozenset({"alpha", "scale", "bias", "dora_scale", "lora_mid.weight", "rescale"})

_RESNET = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
}
_PROJECTIONS = ("_q_proj", "_k_proj", "_v_proj", "_out_proj")


def read(layout: Layout, contents: Contents) -> Report:
    """Returns what AUTOMATIC1111's WebUI makes of a file."""
    found = _sort(layout, contents)
    kind = a1111_version(contents.metadata)
    return make_report(
        PROGRAM,
        VERSION,
        layout,
        contents,
        left=found.left,
        factors=found.factors,
        fits=same_product,
        misfit='lists the file under "Networks with errors", and draws without the modules that do not fit',
        kind=kind,
        refusal=found.refusal,
        notes=[*found.notes, *listing_notes(kind, layout.kind)],
    )


@dataclass
class _Found:
    left: list[str] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    refusal: str | None = None
    notes: list[str] = field(default_factory=list)


def _sort(layout: Layout, contents: Contents) -> _Found:
    layers = _layers(layout)
    sd2 = any(layer.startswith("model_transformer_resblocks_") for layer in layers)
    modules = {name: parts for name, parts in contents.modules().items() if name != "bundle_emb"}
    keys = {name: key for name in modules if (key := _resolve(name, layers, sd2))}
    idle = _incomplete(set(keys.values()), layers)
    found, dropped = _Found(), 0
    for name, parts in modules.items():
        if name not in keys or keys[name] in idle:
            found.left += [key_of(name, part) for part in parts]
            continue
        half = next((h for h in _HALVES if h[0] in parts and h[1] in parts), None)
        if half is not None and "lora_mid.weight" not in parts:
            found.factors.append(Factors(name, layers[keys[name]], parts[half[0]], parts[half[1]]))
            found.refusal = found.refusal or _unloadable(layout, found.factors[-1])
        elif half is None and not _TYPES & parts.keys():
            found.refusal = found.refusal or f'"Could not find a module type" for {name}, which has {", ".join(parts)}'
        renamed = half == _HALVES[1]  # nothing but the two factors comes along then
        dropped += renamed and "alpha" in parts
        known = {*(half or ()), *(() if renamed else _TYPES | _EXTRAS)}
        found.left += [key_of(name, part) for part in parts if part not in known]
    if idle:
        found.notes.append(
            "applies OpenCLIP's attention only where q_proj, k_proj, v_proj and out_proj of a layer are all in the file"
        )
    if dropped:
        found.notes.append(f"drops alpha of {dropped} modules, because their factors are called lora_A and lora_B")
    return found


def _layers(layout: Layout) -> dict[str, Place]:
    """Returns the layers by the original program's names, dots as underscores, as the WebUI lists them."""
    layers: dict[str, Place] = {}
    for path, original in layout.originals.items():
        layers[f"diffusion_model_{flat(original)}"] = ("denoiser", path)
    for number, encoder in enumerate(layout.family.text_encoders):
        prefix = f"{number}_" if len(layout.family.text_encoders) > 1 else ""
        for path in layout.components.get(encoder.component, {}):
            name = f"transformer_text_model_{flat(path)}"
            if encoder.open_clip:
                source = open_clip(path)
                if source is None:
                    continue
                name = f"model_{flat(source[0])}"
                if source[1] is not None:  # a third of the joint matrix
                    name = name.removesuffix("_in_proj") + _PROJECTIONS[source[1]]
            layers[prefix + name] = (encoder.component, path)
    return layers


def _resolve(name: str, layers: Mapping[str, Place], sd2: bool) -> str | None:
    """Returns the original program's name for a module of a file, if there is such a layer."""
    candidates = [_converted(name, sd2)]
    if "lora_unet" in name:
        candidates.append(name.replace("lora_unet", "diffusion_model"))
    elif "lora_te1_text_model" in name:
        candidates += [name.replace("lora_te1", start) for start in ("0_transformer", "transformer")]
    return next((candidate for candidate in candidates if candidate in layers), None)


def _converted(name: str, sd2: bool) -> str:
    if name.startswith("lora_unet_"):
        inner = _denoiser(name.removeprefix("lora_unet_"))
        return f"diffusion_model_{inner}" if inner else name
    if match := re.match(r"lora_te(2?)_text_model_encoder_layers_(\d+)_(.+)", name):
        second, layer, inner = match[1] == "2", match[2], match[3]
        if not second and not sd2:
            return f"transformer_text_model_encoder_layers_{layer}_{inner}"
        for theirs, ours in (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn")):
            if theirs in inner:
                inner = inner.replace(theirs, ours)
                break
        return f"{'1_' if second else ''}model_transformer_resblocks_{layer}_{inner}"
    return name


def _denoiser(inner: str) -> str | None:
    """Counts blocks as the WebUI does, which asks neither whether they exist nor, for samplers, what follows."""
    if inner in _ENDS:
        return _ENDS[inner]
    if match := re.match(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", inner):
        number = 3 * int(match[2]) + int(match[4])
        attention = match[3] == "attentions"
        suffix = match[5] if attention else _RESNET.get(match[5], match[5])
        half = f"input_blocks_{number + 1}" if match[1] == "down" else f"output_blocks_{number}"
        return f"{half}_{1 if attention else 0}_{suffix}"
    if match := re.match(r"mid_block_(attentions|resnets)_(\d+)_(.+)", inner):
        attention = match[1] == "attentions"
        suffix = match[3] if attention else _RESNET.get(match[3], match[3])
        return f"middle_block_{1 if attention else 2 * int(match[2])}_{suffix}"
    if match := re.match(r"down_blocks_(\d+)_downsamplers_0_conv", inner):
        return f"input_blocks_{3 * int(match[1]) + 3}_0_op"
    if match := re.match(r"up_blocks_(\d+)_upsamplers_0_conv", inner):
        return f"output_blocks_{3 * int(match[1]) + 2}_{2 if int(match[1]) else 1}_conv"
    return None


def _incomplete(keys: set[str], layers: Mapping[str, Place]) -> set[str]:
    """Returns the projections of OpenCLIP's layers of which not all four are there."""
    idle: set[str] = set()
    for key in keys:
        stem = re.sub(r"_(q|k|v|out)_proj$", "", key)
        if "model_transformer_resblocks_" in key and stem != key:
            wanted = {stem + projection for projection in _PROJECTIONS}
            if not wanted <= keys and wanted <= layers.keys():
                idle |= wanted & keys
    return idle


def _unloadable(layout: Layout, found: Factors) -> str | None:
    """Says why a convolution's factors cannot even be copied into layers of their own, which ends the loading."""
    layer = layout.shape(found.place)
    if layer is None or len(layer) != 4:
        return None
    kernel: Shape = found.down[2:]
    if math.prod(found.up[2:]) != 1 or (math.prod(kernel) != 1 and math.prod(kernel) != math.prod(layer[2:])):
        return f"the kernels of {found.name} do not fit its layer: down {list(found.down)}, up {list(found.up)}"
    return None
