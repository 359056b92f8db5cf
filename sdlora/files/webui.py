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


def printable(text: str, length: int = 200) -> str:
    """Makes a stranger's text safe for a terminal: one line, no control characters, at most `length` letters."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= length else line[: length - 3] + "..."
