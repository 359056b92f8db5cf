"""The text inside a PNG that says how the picture was made, in the WebUI's own form.

Dropped on the WebUI's "PNG Info" tab, a picture of ours fills in its prompt, seed and settings there. So the text names
what the WebUI would otherwise guess: the schedule type, and that the noise came from the CPU.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.sampling.prompts import Prompt
from sdlora.sampling.samplers import split_schedule

_FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_SHORT_HASH = 12
_DECODER = "VAE Decoder"
_LORA_HASHES = "Lora hashes"


def parameters(
    prompt: Prompt,
    *,
    base_name: str,
    base_hash: str | None,
    loras: Sequence[tuple[str, float, str]],
    clip_skip: int,
    version: str,
    decoder: str | None = None,
) -> str:
    """Describes a picture as the WebUI does: prompt, negative prompt, and one line of settings.

    Args:
        prompt: as drawn, nothing left open.
        base_name: name of the base model.
        base_hash: first 10 hex digits of the SHA-256 of its file, `None` where it is no single file.
        loras: file name without ending, strength, and model hash (of which 12 digits are written; empty: none).
        clip_skip: as in the WebUI; 1 is its default and is not written.
        version: of sdlora.
        decoder: what decoded it in place of the base's VAE, e.g. TAESD.

    Source: AUTOMATIC1111 WebUI 1.10, `create_infotext` in `modules/processing.py`.
    """
    tags = [f"<lora:{name}:{strength:g}>" for name, strength, _ in loras]
    sampler, schedule = split_schedule(prompt.sampler or "")
    hashes = ", ".join(f"{name}: {digest[:_SHORT_HASH]}" for name, _, digest in loras if digest)
    fields: dict[str, str | None] = {
        "Steps": f"{prompt.steps}",
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": None if prompt.cfg is None else f"{prompt.cfg:g}",
        "Seed": f"{prompt.seed}",
        "Size": f"{prompt.width}x{prompt.height}",
        "Model hash": base_hash,
        "Model": base_name,
        "Clip skip": f"{clip_skip}" if clip_skip > 1 else None,
        "RNG": "CPU",
        _DECODER: decoder,
        _LORA_HASHES: hashes or None,
        "Version": f"sdlora {version}",
    }
    lines = [" ".join([prompt.text, *tags]).strip()]
    if prompt.negative:
        lines.append(f"Negative prompt: {prompt.negative}")
    lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value is not None))
    return "\n".join(lines).strip()


def parse_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """Reads such a text back as the WebUI does: the prompt with its tags, the negative prompt, and the settings.

    Source: AUTOMATIC1111 WebUI 1.10, `parse_generation_parameters` in `modules/infotext_utils.py`.
    """
    *lines, last = text.strip().split("\n")
    found = _FIELD.findall(last)
    if len(found) < 3:  # the WebUI's own rule: fewer fields are prose
        lines, found = [*lines, last], []
    texts: dict[bool, list[str]] = {False: [], True: []}
    negative = False
    for line in lines:
        if line.startswith("Negative prompt:"):
            negative, line = True, line.removeprefix("Negative prompt:")
        texts[negative].append(line.strip())
    return "\n".join(texts[False]), "\n".join(texts[True]), {name: _unquote(value) for name, value in found}


def decoder_of(text: str) -> str | None:
    """Returns what a picture was decoded by in place of its base's VAE, from its text."""
    return parse_parameters(text)[2].get(_DECODER)


def same_but_for_loras(first: str, second: str) -> bool:
    """Tells whether two texts describe the same picture, whatever LoRAs and decoder it was drawn with."""
    return _without_loras(first) == _without_loras(second)


def _without_loras(text: str) -> tuple[str, str, dict[str, str]]:
    prompt, negative, fields = parse_parameters(text)
    return prompt.split(" <lora:")[0], negative, {k: v for k, v in fields.items() if k not in (_DECODER, _LORA_HASHES)}


def png_info(text: str) -> PngInfo:
    """Wraps the text for Pillow's `save(..., pnginfo=...)`, under the key `parameters` that the WebUI looks for."""
    info = PngInfo()
    info.add_text("parameters", text)  # Pillow takes iTXt where the text is not Latin-1
    return info


def stored_text(path: Path) -> str:
    """Returns the text inside a PNG, empty if it has none."""
    with Image.open(path) as image:
        return str(image.info.get("parameters", ""))


def _quote(value: str) -> str:
    if any(c in value for c in ',\n:"'):
        return json.dumps(value, ensure_ascii=False)
    return value


def _unquote(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        return str(json.loads(value))
    except json.JSONDecodeError:
        return value
