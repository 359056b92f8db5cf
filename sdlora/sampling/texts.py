"""Texts of prompts, encoded once however often they are drawn, and one by one.

In a batch the last bits of the result would depend on which texts happen to be neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdlora.families import Conditioning, Parts
from sdlora.families.text import count_chunks
from sdlora.sampling.modes import evaluating
from sdlora.sampling.prompts import Prompt

EncodedTexts = dict[tuple[str, int, int], Conditioning]
"""By text, clip skip and length in pieces of 75 tokens: what the denoiser is told, a batch of one."""


def prompt_chunks(parts: Parts, prompt: Prompt) -> int:
    """Returns how many pieces of 75 tokens a prompt and its negative one both have room in."""
    return max(count_chunks(parts, prompt.text), count_chunks(parts, prompt.negative))


@torch.no_grad()
def encode_texts(
    parts: Parts, texts: Sequence[str], clip_skip: int, num_chunks: int, known: EncodedTexts
) -> Conditioning:
    """Encodes texts with their (word:1.2), [word] and BREAK, in the denoiser's number format and on its device.

    Args:
        parts: the base.
        texts: B texts.
        clip_skip: 1 takes the text encoder's last layer, n the n-th from the end.
        num_chunks: pieces of 75 tokens to which all are filled up; none may be longer.
        known: what these encoders have encoded before; the others are added.

    Returns:
        The batch in front.
    """
    keys = [(text, clip_skip, num_chunks) for text in texts]
    with evaluating(*parts.text_encoders.values()):
        for key in keys:
            if key not in known:
                one = parts.family.encode_prompts(parts, [key[0]], clip_skip, num_chunks=num_chunks, emphasis=True)
                known[key] = {name: tensor.to(parts.device, parts.dtype) for name, tensor in one.items()}
    return {name: torch.cat([known[key][name] for key in keys]) for name in known[keys[0]]}
