"""How much is drawn at once, and how much memory that leaves for weights that are merged while drawing.

The unit is a position: one place of one latent picture. With guidance every picture passes the denoiser twice.
"""

from __future__ import annotations

import torch

from sdlora.families import Parts
from sdlora.sampling.prompts import Prompt

_MOST = {"cpu": (4, 8192)}
_MOST_ELSEWHERE = (16, 65536)
"""Pictures, and positions, that pass the denoiser at once, by device.

Measured on one CPU core in fp32, the time of a picture in a batch of 1, 2, 4 and 8: with nano at 128 px 1, 0.75, 0.63
and 0.65; with SD 1.5's layers at half their width 1, 0.81 and 0.69 at 128 px, 1, 0.93 and 0.92 at 256 px, and nothing
won at 512 px. The numbers for GPUs are not measured; `pipeline` halves a batch that does not fit.
"""

_SHARE = 0.5
"""Of the free memory, for merged weights; the rest is the pictures'."""


def pictures_at_once(parts: Parts, prompt: Prompt) -> int:
    """Returns how many pictures of a prompt's size are drawn together, at least 1."""
    assert prompt.width and prompt.height
    pictures, positions = _MOST.get(parts.device.type, _MOST_ELSEWHERE)
    needed = 2 * (prompt.width // parts.vae_factor) * (prompt.height // parts.vae_factor)
    return max(1, min(pictures, positions // needed))


def room_for_merging(device: torch.device) -> int | None:
    """Returns how many bytes merged weights may take on a device; `None` where nobody can tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it, for us too
        return int(_SHARE * (free + unused))
    if device.type == "cpu":
        import psutil  # comes with accelerate

        return int(_SHARE * psutil.virtual_memory().available)
    return None
