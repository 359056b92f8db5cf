"""diffusers: names are rewritten into its own, letter by letter, and handed to peft with the factors.

What cannot be rewritten, or does not fit, is an error, and nothing is loaded; what can be rewritten and has no layer is
logged. One more thing is easily overlooked: where alpha differs between the modules of one model, some of them are
given the alpha that most have.

Source: diffusers 0.42.1, `loaders/lora_conversion_utils.py`, `loaders/lora_pipeline.py`, `loaders/lora_base.py`,
`utils/state_dict_utils.py` and `utils/peft_utils.py`; run with peft 0.21.2 and transformers 5.24.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sdlora.files.loaders.contents import Contents, key_of
from sdlora.files.loaders.layout import Layout, Place, Shape, flat, same_shape
from sdlora.files.loaders.report import Factors, Report, make_report

PROGRAM, VERSION = "diffusers", "0.42.1 (peft 0.21.2, transformers 5.24)"

DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
_PREFIXES = {
    "lora_unet_": "denoiser",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
_DOTTED = {"unet": "denoiser", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}
_FLAT = ("CLIPTextModel",)
"""Classes of text encoders that have no level `text_model` since transformers 5.6."""

_ORIGINAL = ("input_blocks", "middle_block", "output_blocks")
_OWN = ("down_blocks", "mid_block", "up_blocks")
_ENDS = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = re.compile(r"\.(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)$")


@dataclass
class _Load:
    """What a call of `load_lora_weights` comes to.

    Attributes:
        left: keys that have no effect.
        factors: modules that found their layer.
        sent: component -> names of the modules handed to it, found or not.
        typed: text encoders whose dialect diffusers could tell from some key.
        refusal: the error that ends the call.
        notes: sentences.
    """

    left: list[str] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    sent: dict[str, list[str]] = field(default_factory=dict)
    typed: set[str] = field(default_factory=set)
    refusal: str | None = None
    notes: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> None:
        """Keeps the first reason."""
        self.refusal = self.refusal or reason


def read(layout: Layout, contents: Contents) -> Report:
    """Returns what `load_lora_weights` of a diffusers pipeline makes of a file."""
    load = _Load(left=[key for key in contents.shapes if "dora_scale" in key])
    keys = {key: shape for key, shape in contents.shapes.items() if "dora_scale" not in key}
    if all(key.startswith(tuple(_PREFIXES)) for key in keys):
        _kohya(layout, keys, load)
    else:
        _dotted(layout, keys, load)
    _hand_over(layout, load)
    return make_report(
        PROGRAM,
        VERSION,
        layout,
        contents,
        left=load.left,
        factors=load.factors,
        fits=same_shape,
        misfit='"size mismatch"',
        stops=True,
        misscaled=_misscaled(layout, contents, load),
        refusal=load.refusal,
        has_base=True,
        notes=load.notes,
    )


def _kohya(layout: Layout, keys: Mapping[str, Shape], load: _Load) -> None:
    recounts = len(layout.family.text_encoders) > 1  # only SDXL's pipeline counts the original blocks anew
    dropped = _dropped(keys) if recounts else set()
    if dropped:
        load.left += sorted(dropped)
        load.notes.append("drops names in the original spelling without a word where others are in its own")
    places = dict(_names(layout))
    modules = Contents({key: shape for key, shape in keys.items() if key not in dropped}, {}, {}).modules()
    for name, parts in modules.items():
        if not {DOWN, UP} <= parts.keys() <= {DOWN, UP, ALPHA}:
            whole = {DOWN, UP} <= parts.keys()
            strange = [part for part in parts if not whole or part not in (DOWN, UP, ALPHA)]
            load.left += [key_of(name, part) for part in strange]
            load.refuse(f"it cannot rename {load.left[-1]}")
            continue
        component = _PREFIXES[next(prefix for prefix in _PREFIXES if name.startswith(prefix))]
        load.sent.setdefault(component, []).append(name)
        if name.endswith("out_proj") or "mlp" in name:
            load.typed.add(component)
        place = places.get(name) or _original_place(name, layout, places, recounts, load)
        if place is None:
            load.left += [key_of(name, part) for part in parts]
        else:
            load.factors.append(Factors(name, place, parts[DOWN], parts[UP]))


def _dropped(keys: Mapping[str, Shape]) -> set[str]:
    """Returns the keys in the original spelling, if there are also some in diffusers' own."""
    original = {key for key in keys if any(block in key for block in _ORIGINAL)}
    mixed = any(block in key for key in keys if key not in original for block in _OWN)
    return original if mixed else set()


def _names(layout: Layout) -> Iterator[tuple[str, Place]]:
    for path in layout.denoiser:
        if not path.startswith("add_embedding."):  # its number is lost on the way
            yield f"lora_unet_{flat(path)}", ("denoiser", path)
    for encoder in layout.family.text_encoders:
        for path in layout.components.get(encoder.component, {}):
            insides = [""] if path.startswith("text_projection") else ["text_model_"]
            insides += [""] if encoder.cls.__name__ in _FLAT else []
            for prefix in (p for p, component in _PREFIXES.items() if component == encoder.component):
                for inside in insides:
                    yield f"{prefix}{inside}{flat(path)}", (encoder.component, path)


def _original_place(
    name: str, layout: Layout, places: Mapping[str, Place], recounts: bool, load: _Load
) -> Place | None:
    if not name.startswith("lora_unet_"):
        return None
    inner = name.removeprefix("lora_unet_")
    if inner in _ENDS:
        return ("denoiser", _ENDS[inner]) if _ENDS[inner] in layout.denoiser else None
    if not recounts or not inner.startswith(_ORIGINAL):
        return None
    try:
        return places.get(f"lora_unet_{_recounted(inner)}")
    except (ValueError, IndexError):
        load.refuse(f"it cannot count the blocks of {name}")
        return None


def _recounted(inner: str) -> str:
    """Counts blocks as `_maybe_map_sgm_blocks_to_diffusers` does: three layers to each, whether they exist or not."""
    pieces = inner.split("_")
    number = int(pieces[2])
    if pieces[0] == "middle":
        rest = "_".join(pieces[3:])
        return f"mid_block_{('resnets_0', 'attentions_0', 'resnets_1')[number]}_{_RESNET.get(rest, rest)}"
    down, place, rest = pieces[0] == "input", int(pieces[3]), "_".join(pieces[4:])
    block, layer = divmod(number - down, 3)
    kind = ("resnets", "attentions", "upsamplers")[place]
    if down and "op" in inner:
        kind, layer, rest = "downsamplers", 0, rest.replace("op", "conv")
    elif not down and kind == "upsamplers":
        layer = 0
    return f"{'down' if down else 'up'}_blocks_{block}_{kind}_{layer}_{_RESNET.get(rest, rest)}"


def _dotted(layout: Layout, keys: Mapping[str, Shape], load: _Load) -> None:
    """Reads the dialects of diffusers and peft: component, path, part, all with dots."""
    stray = next((key for key in keys if "lora" not in key), None)
    if stray is not None:
        load.refuse(f"\"Make sure all LoRA param names contain 'lora'\": {stray}")
    for key, shape in keys.items():
        component = _DOTTED.get(key.partition(".")[0])
        split = re.fullmatch(
            r"[^.]+\.(.+?)(\.lora_(?:A|B)|[._]lora\.(?:down|up)|\.lora_linear_layer\.(?:down|up))\.weight", key
        )
        if component is None or split is None:
            load.left.append(key)
            continue
        path, part = _path(component, split[1]), split[2]
        name = key.removesuffix(f"{part}.weight")
        load.sent.setdefault(component, []).append(name)
        if (
            "linear_layer" in part
            or path.endswith("out_proj")
            or (part.startswith(".lora_") and _ATTENTION.search(path))
        ):
            load.typed.add(component)
        down = part.endswith(("_A", "down"))
        other = part[:-1] + "B" if part.endswith("_A") else part.removesuffix("down") + "up"
        if layout.shape((component, path)) is None:
            load.left.append(key)
        elif down and f"{name}{other}.weight" in keys:
            load.factors.append(Factors(name, (component, path), shape, keys[f"{name}{other}.weight"]))


def _path(component: str, path: str) -> str:
    path = path.replace(".processor.", ".")
    if component == "denoiser":
        return re.sub(r"\.to_out$", ".to_out.0", path)
    return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", path).removeprefix("text_model.")


def _hand_over(layout: Layout, load: _Load) -> None:
    """Finds the errors of peft and of the loading of text encoders, which come after all names are rewritten."""
    encoders = {encoder.component for encoder in layout.family.text_encoders}
    for component in ("denoiser", "text_encoder", "text_encoder_2"):
        found = any(factors.place[0] == component for factors in load.factors)
        if component not in load.sent or component not in {"denoiser", *encoders}:
            continue
        if component != "denoiser" and component not in load.typed:
            load.refuse(f'"Could not automatically infer state dict type" of the {component}')
        elif not found:
            load.refuse(f"none of the layers for the {component} is there")


def _misscaled(layout: Layout, contents: Contents, load: _Load) -> Iterator[str]:
    """Yields modules whose alpha is replaced by the one that most modules of their model have.

    diffusers gives peft a table of the exceptions; the names that it writes there for attention layers, and for all
    layers of a flat text encoder, match nothing.
    """
    flattened = {encoder.component for encoder in layout.family.text_encoders if encoder.cls.__name__ in _FLAT}
    for component, names in load.sent.items():
        alphas = {n: contents.alphas[f"{n}.{ALPHA}"] for n in names if f"{n}.{ALPHA}" in contents.alphas}
        if not alphas:
            continue
        ((usual, _),) = Counter(alphas.values()).most_common(1)
        for factors in (f for f in load.factors if f.place[0] == component):
            own = alphas.get(factors.name, float(factors.down[0]))
            kept = component not in flattened and not _ATTENTION.search(factors.place[1])
            if own != usual and not (kept and factors.name in alphas):
                yield f"{factors.name}: alpha {own:g}, applied as {usual:g}"
