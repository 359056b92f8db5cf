"""Measures a base while it is trained: fixed pictures, fixed noise, with the right words and with wrong ones."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTokenizer

from sdlora.diffusion.losses import squared_error
from sdlora.diffusion.noise import generator
from sdlora.diffusion.schedule import Schedule
from tools.pretrain_nano.captions import prompt
from tools.pretrain_nano.latents import Latents
from tools.pretrain_nano.model import token_ids
from tools.pretrain_nano.sources import STYLE_OF

PICTURES = 192
LEVELS = (500, 700, 900)
"""Timesteps at which a picture's content is decided."""


@torch.no_grad()
def probe(
    text_encoder: nn.Module, denoiser: nn.Module, schedule: Schedule, tokenizer: CLIPTokenizer, data: Latents
) -> dict[str, float]:
    """Returns how well the words are used.

    Returns:
        `error`: mean squared error of the picture that the denoiser expects, in latents, over 192 pictures spread
        through `data` at three noise levels. `words`: by how much that error is smaller than with another picture's
        words, in [0, 1] (0: words are ignored).
    """
    device = next(denoiser.parameters()).device
    rows = [n * len(data) // PICTURES for n in range(PICTURES)]
    captions = [prompt(data.concepts[row], STYLE_OF[data.styles[row]]) for row in rows]
    clean = data.values[rows, 0].float().to(device)
    noise = torch.randn(clean.shape, generator=generator("probe")).to(device)
    states = text_encoder(token_ids(tokenizer, captions).to(device)).last_hidden_state
    wrong = states.roll(PICTURES // 2, 0)
    sums = {"right": 0.0, "wrong": 0.0}
    for level in LEVELS:
        t = torch.full((PICTURES,), level, device=device)
        seen = schedule.add_noise(clean, noise, t)
        alpha_bar = schedule.alphas_cumprod[level]
        for kind, given in (("right", states), ("wrong", wrong)):
            for part in range(0, PICTURES, 64):
                cut = slice(part, part + 64)
                guess = denoiser(seen[cut], t[cut], given[cut], return_dict=False)[0]
                error = squared_error(guess, noise[cut]).mean().item()
                sums[kind] += error * float((1 - alpha_bar) / alpha_bar) / (len(LEVELS) * PICTURES / 64)
    return {"error": sums["right"], "words": 1 - sums["right"] / sums["wrong"]}
