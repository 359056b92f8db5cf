"""What other programs make of a file's metadata, so that `inspect` can say it before a user wonders.

Their rules are small tables that nobody sees: a LoRA of the wrong class is simply not shown. Here they are written out
as pure functions, the rules in the order in which the programs ask them.
"""

from __future__ import annotations

from collections.abc import Mapping


def a1111_version(metadata: Mapping[str, str]) -> str:
    """Returns the class that AUTOMATIC1111's WebUI gives a LoRA: SDXL, SD2, SD1 or Unknown.

    A LoRA whose class differs from the loaded model's is hidden there; Unknown is shown with every model.

    Source: AUTOMATIC1111 1.10.1, `extensions-builtin/Lora/network.py`.
    """
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if metadata else "Unknown"


def forge_version(metadata: Mapping[str, str]) -> str:
    """Returns the class that Forge gives a LoRA: Flux, SDXL, SD2, SD1 or Unknown.

    Source: stable-diffusion-webui-forge at commit dfdcbab, `extensions-builtin/sd_forge_lora/network.py`.
    """
    architecture = metadata.get("modelspec.architecture", "")
    implementation = metadata.get("modelspec.implementation", "")
    if implementation == "https://github.com/black-forest-labs/flux" or architecture == "flux-1-dev/lora":
        return "Flux"
    if architecture == "stable-diffusion-xl-v1-base/lora":
        return "SDXL"
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if architecture == "stable-diffusion-v1/lora" else "Unknown"


def listing_notes(version: str, expected: str | None) -> list[str]:
    """Says, in sentences, where a WebUI will not show a LoRA as its owner expects.

    Args:
        version: the class that the WebUI gives it.
        expected: the class of the base that it is for; `None` if no WebUI can load such a base.
    """
    if expected is None or version == expected:
        return []
    if version == "Unknown":
        return [f"cannot tell from the metadata that it is for {expected}, and lists it as Unknown"]
    return [f"takes it for {version}, and hides it while an {expected} model is loaded; <lora:NAME:1> still works"]


def alias(metadata: Mapping[str, str], stem: str) -> str:
    """Returns the name by which the WebUIs call a LoRA in a prompt, as long as no other file has it too.

    Source: `get_alias` in AUTOMATIC1111 1.10.1's `extensions-builtin/Lora/network.py`; "none" is reserved there.
    """
    name = metadata.get("ss_output_name", stem)
    return stem if name.lower() == "none" else name


def printable(text: str, length: int = 200) -> str:
    """Makes a stranger's text safe for a terminal: one line, no control characters, at most `length` letters."""
    line = "".join(c if c.isprintable() else " " for c in text[: length + 1])  # a text may be as long as the file
    return line if len(line) <= length else line[: length - 3] + "..."
