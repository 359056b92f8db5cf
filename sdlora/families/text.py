"""Texts become conditioning, the same way for every family: chunk by chunk, encoder beside encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sdlora.errors import ModelError
from sdlora.families.chunks import chunk, encode_chunks
from sdlora.families.family import Conditioning, Parts


def encode_prompts(
    parts: Parts, texts: Sequence[str], clip_skip: int = 1, *, num_chunks: int | None = 1, emphasis: bool = False
) -> Conditioning:
    """Encodes texts into `states`, (B, 77 n, D), and where the family has it `pooled`, (B, P).

    Args:
        parts: the base.
        texts: B prompts.
        clip_skip: 1 takes each encoder's usual layer, n the n-th from the end, but never a later one than usual: SDXL
            takes the last but one at 1 and at 2.
        num_chunks: n, pieces of 75 tokens; a longer text is cut, a shorter one padded. `None`: as many as are needed.
        emphasis: whether (word:1.2), [word] and BREAK are instructions, as in the WebUI, or plain words.

    Raises:
        ModelError: if an encoder has fewer layers.

    Source: AUTOMATIC1111 WebUI's `sd_hijack_clip.py`; clip skip as sd-scripts' `get_hidden_states`.
    """
    states, pooled = [], {}
    for spec in parts.family.text_encoders:
        encoder: Any = parts.text_encoders[spec.component]
        layers = encoder.config.num_hidden_layers
        layer = max(clip_skip, spec.layer)
        if layer > layers:
            raise ModelError(f"clip skip {clip_skip} is too deep: a text encoder of {parts.name} has {layers} layers")
        tokenizer = parts.tokenizers[spec.component]
        chunked = [chunk(tokenizer, text, emphasis=emphasis, max_chunks=num_chunks) for text in texts]
        one, whole = encode_chunks(
            encoder,
            chunked,
            layer=layer,
            normed=spec.normed,
            pooled=spec.pooled,
            min_chunks=num_chunks or 1,
            device=next(encoder.parameters()).device,
        )
        states.append(one)
        pooled |= {} if whole is None else {"pooled": whole}
    return {"states": states[0] if len(states) == 1 else torch.cat(states, dim=-1), **pooled}


def clip_skip_notes(parts: Parts, clip_skip: int) -> list[str]:
    """Says whether a clip skip asks for the very layers that are taken anyway, as 2 does of SDXL; empty if not."""
    if clip_skip == 1 or any(clip_skip > spec.layer for spec in parts.family.text_encoders):
        return []
    return [f"clip skip {clip_skip} has no effect: {parts.family.title} never takes a later layer"]


def count_chunks(parts: Parts, text: str, *, emphasis: bool = True) -> int:
    """Returns how many pieces of 75 tokens a prompt needs."""
    return max(len(chunk(t, text, emphasis=emphasis, max_chunks=None).ids) for t in parts.tokenizers.values())


def unseen(parts: Parts, text: str, num_chunks: int) -> str:
    """Returns the end of a caption that does not fit into `num_chunks` pieces of 75 tokens; empty if all fits."""
    ends = [chunk(t, text, emphasis=False, max_chunks=num_chunks).unseen for t in parts.tokenizers.values()]
    return max(ends, key=len)
