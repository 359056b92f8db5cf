"""CLIP's tokenizer from its merges alone, for checkpoints that come without one. The vocabulary is built, not stored.

All Stable Diffusions share it; they differ in the token that fills the end of a short text.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

MERGES = Path(__file__).parent / "clip" / "merges.txt.gz"

VOCABULARY_SIZE = 49408


@cache
def clip_tokenizer(pad: str) -> CLIPTokenizer:
    """Builds OpenAI's CLIP tokenizer, for texts of up to 77 tokens.

    Args:
        pad: the token behind the end of a short text: `<|endoftext|>` in SD 1.x and SDXL's first text encoder, `!` in
            SD 2.x and SDXL's second.
    """
    merges: Any = _merges()
    return CLIPTokenizer(_vocabulary(merges), merges, pad_token=pad, model_max_length=77)


def _merges() -> list[tuple[str, str]]:
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    return [(left, right) for left, _, right in (line.partition(" ") for line in lines)]


def _vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Numbers the tokens: single bytes, the same at the end of a word, what the merges make, start and end.

    Source: Radford et al., OpenAI's CLIP, `clip/simple_tokenizer.py`.
    """
    letters = _byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def _byte_letters() -> list[str]:
    """Returns a visible letter for each of the 256 bytes: itself where it is one, a letter from U+0100 on otherwise."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in visible] + [chr(0x100 + n) for n in range(256 - len(visible))]
