"""`sdlora lora`: everything that is done with LoRA files without training or drawing."""

from __future__ import annotations

import click

from sdlora.cli.lazy import LazyGroup

COMMANDS = {
    "info": ("inspect", "Show what a LoRA file holds and what other programs will make of it."),
    "check": ("lora_check", "Say of each program whether it loads a LoRA file whole."),
    "convert": ("lora_convert", "Write a LoRA file in the spelling of another program."),
    "merge": ("lora_merge", "Make one LoRA of several, or put LoRAs into a checkpoint for good."),
    "resize": ("lora_resize", "Cut a LoRA down to a smaller rank."),
    "extract": ("lora_extract", "Take out of two checkpoints, as a LoRA, what one learned beyond the other."),
    "install": ("lora_install", "Copy a LoRA to where a WebUI looks for it."),
}


@click.command("lora", cls=LazyGroup, table=COMMANDS)
def command() -> None:
    """Do things with LoRA files: look into them, and make other files of them.

    \b
    sdlora lora info style.safetensors
    sdlora lora merge one.safetensors:0.8 two.safetensors:0.5 -o both.safetensors
    sdlora lora merge style.safetensors --into model.safetensors -o model-style.safetensors
    sdlora lora resize style.safetensors small.safetensors --energy 0.95
    """  # noqa: D301 - click needs the real \b
