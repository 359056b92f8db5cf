"""Gives the text encoder a first idea of what its words look like, before there is anybody to draw for.

A caption and a picture of the same concept in the same style are brought together, all other pairs of the batch
apart, as in CLIP. The picture's side is thrown away. A text encoder that starts this way is obeyed after far fewer
pictures.

Source: Radford et al. 2021, arXiv:2103.00020, figure 3 (symmetric cross entropy over a batch's similarities).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from tools.pretrain_nano.batches import batch
from tools.pretrain_nano.latents import Latents
from tools.pretrain_nano.model import WIDTH

STEPS = 400
SIZE = 192
LONGEST = 24
"""Tokens that are looked at; captions here are shorter, and a causal encoder's states do not depend on what follows."""


class PictureTower(nn.Sequential):
    """Latents (B, 4, 16, 16) to one vector each, (B, 128); serves the warm-up only."""

    def __init__(self) -> None:
        channels = (4, 64, 128, 192)
        layers: list[nn.Module] = []
        for width, following in pairwise(channels):
            layers += [nn.Conv2d(width, following, 3, padding=1), nn.GroupNorm(16, following), nn.SiLU()]
            layers += [nn.Conv2d(following, following, 3, stride=2, padding=1), nn.GroupNorm(16, following), nn.SiLU()]
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels[-1] * 4, WIDTH))


def end_states(text_encoder: CLIPTextModel, ids: Tensor) -> Tensor:
    """Returns each caption's state at its end of text, (B, 128)."""
    states = text_encoder(ids).last_hidden_state
    return states[torch.arange(len(ids)), (ids == ids.max()).int().argmax(1)]


def warm_up(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, data: Latents, seed: int, steps: int = STEPS
) -> float:
    """Trains the text encoder in place.

    Returns:
        Share of captions, over the last fifty steps, whose own picture was the nearest of the batch.
    """
    torch.manual_seed(seed)
    tower = PictureTower()
    scale = nn.Parameter(torch.tensor(2.0))
    parameters = [*text_encoder.parameters(), *tower.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    hits = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50, (steps - step) / (steps / 2))
        b = batch(data, step, SIZE, seed)
        told = [n for n, text in enumerate(b.captions) if text]
        ids = tokenizer(
            [b.captions[n] for n in told],
            padding="max_length",
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        ).input_ids
        words = F.normalize(end_states(text_encoder, ids), dim=-1)
        pictures = F.normalize(tower(b.latents[told]), dim=-1)
        similarity = words @ pictures.T * scale.exp()
        truth = torch.arange(len(told))
        loss = (F.cross_entropy(similarity, truth) + F.cross_entropy(similarity.T, truth)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hits.append((similarity.argmax(1) == truth).float().mean().item())
        if step % 50 == 49:
            print(
                f"text warm-up {step + 1}/{steps}: {sum(hits[-50:]) / 50:.1%} of captions find their picture",
                flush=True,
            )
    return sum(hits[-50:]) / len(hits[-50:])
