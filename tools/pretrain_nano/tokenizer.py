"""A byte-pair vocabulary of CLIP's kind, small enough for a miniature text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer

VOCABULARY = 2048
"""Number of tokens: 512 bytes, merges, the trigger words' merges, begin and end of text."""

TRIGGERS = (
    "sks",
    "ohwx",
    "zwx",
    "vrk",
    "qlr",
    "mystyle",
    "thw",
    "xyu",
    "kvz",
    "nrq",
    "plmi",
    "grf",
    "oxz",
    "hta",
    "jqb",
    "wexo",
)
"""Words without a meaning that are one token each; a LoRA's trigger word is best one of them."""


def train_tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Learns the merges from captions, and saves the tokenizer.

    The end of text has the highest id: some programs find the end by the highest id, others by its name, and both
    are right.

    Args:
        captions: sentences as the base will see them.
        folder: is made; gets transformers' tokenizer files.
    """
    empty = CLIPTokenizer()  # brings CLIP's rules for splitting text, without a vocabulary
    splitter = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    splitter.normalizer = empty.backend_tokenizer.normalizer
    splitter.pre_tokenizer = empty.backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - 4 * len(TRIGGERS) - 256,
        initial_alphabet=_byte_letters(),
        limit_alphabet=256,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    splitter.train_from_iterator(captions, trainer)
    merges = _merges(splitter)
    for trigger in TRIGGERS:
        pieces = _split(trigger, merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges]
    filler = [f"<|unused{n}|>" for n in range(VOCABULARY - 2 - len(tokens))]
    tokens += [*filler, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(first, second) for first, second in json.loads(tokenizer.to_str())["model"]["merges"]]


def _split(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Applies merges to one word, as byte-pair encoding does: the earliest learned first."""
    ranks = {pair: n for n, pair in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        rank, at = min((ranks.get(pair, len(ranks)), n) for n, pair in enumerate(pairwise(pieces)))
        if rank == len(ranks):
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def _byte_letters() -> list[str]:
    """Returns the 256 letters that stand for bytes, in CLIP's order (printable Latin-1 first, then the others)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [n for n in range(256) if n not in printable]
    return [chr(n) for n in printable] + [chr(256 + n) for n in range(len(others))]
