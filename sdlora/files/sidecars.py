"""The files beside a LoRA that make it usable at a glance: NAME.json with the word that calls it, NAME.png to see it.

AUTOMATIC1111's WebUI, Forge and InvokeAI read both; whoever opens the Lora tab has the trigger word typed in for them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdlora.atomic import replacing, write_text
from sdlora.errors import LoraFileError
from sdlora.files.webui import a1111_version

if TYPE_CHECKING:
    from sdlora.families import Family
    from sdlora.files.kohya import LoraFile

PREVIEW_SIDE = 512
"""Longest side of NAME.png in pixels; WebUIs show it as a card."""


def write_sidecars(
    lora_path: Path, *, trigger: str, description: str, preview: Image.Image | None, family: Family
) -> list[Path]:
    """Writes, if there is a preview, NAME.png and then NAME.json beside NAME.safetensors; replaces older ones.

    Args:
        lora_path: the LoRA file.
        trigger: the word that calls the style; may be empty.
        description: one line for people.
        preview: a picture drawn with the LoRA, any size, or `None`.
        family: decides the WebUI's "sd version".

    Returns:
        The files written.

    Raises:
        TrainingError: if the disk is full or the folder cannot be written.
    """
    content = {
        "description": description,
        "sd version": a1111_version(family.metadata),
        "activation text": trigger,
        "preferred weight": 0,  # 0 leaves it to the WebUI's own setting, which is 1
        "negative text": "",
        "notes": "",
    }
    text, card = lora_path.with_suffix(".json"), lora_path.with_suffix(".png")
    if preview is not None:
        picture = preview.convert("RGB")
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
        with replacing(card) as path:
            picture.save(path)
    write_text(text, json.dumps(content, indent=4, ensure_ascii=False) + "\n")  # last: then a run is complete
    return [text] if preview is None else [text, card]


def activation_text(lora: LoraFile) -> str:
    """Returns the word that calls a LoRA: "activation text" of NAME.json, which its owner may edit, else its metadata.

    Raises:
        LoraFileError: if NAME.json is there and cannot be read.
    """
    file = lora.path.with_suffix(".json")
    content: Any = {}
    if file.is_file():
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise LoraFileError(f"cannot read {file}: {error}; repair it or move it away") from error
    text = content.get("activation text") if isinstance(content, dict) else None
    text = text or lora.metadata.get("modelspec.trigger_phrase", "")
    return text.strip() if isinstance(text, str) else ""
