"""sdlora: teaches Stable Diffusion a style from a folder of pictures, as a LoRA file that every program loads."""

import os

# No telemetry, from us or from the libraries underneath. Must stand before their first import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
