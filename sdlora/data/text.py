"""Text states of frozen encoders: each caption is encoded once and then found in memory or, next time, on the disk.

On a CPU captions are encoded one at a time: in a batch the last bits of the result would depend on which captions
happen to be neighbours, and a resumed run would no longer equal an uninterrupted one. On a GPU that takes many times as
long, so captions that are known before training are encoded together, and kept on the disk, where a resumed run finds
them.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdlora.data.cache import Cache, fingerprint
from sdlora.data.stacks import Stacks
from sdlora.families import Conditioning, Parts
from sdlora.families.text import unseen

MEMORY_BYTES = 2**30
"""Memory for text states; beyond it those that were not used for longest are let go."""
BATCH = 32
"""Captions that a GPU encodes at once."""
_VERSION = 1  # raise it when the same caption is to be encoded differently


class TextStates:
    """Turns captions into conditioning, `encode_prompts` with a memory.

    A caption goes to the disk when it is asked for a second time: shuffled ones, which hardly ever come back, would
    fill it.

    Args:
        parts: the base, its text encoders as they will stay; built before anything is injected into them.
        cache: the disk.
        clip_skip: layer to take, counted from the end.
        num_chunks: pieces of 75 tokens that are read of every caption.
        fingerprint: of the text encoders and tokenizers, if it is known already.

    Attributes:
        encoded: how many captions have been encoded.
        fingerprint: of the text encoders and tokenizers.
    """

    def __init__(
        self, parts: Parts, cache: Cache, clip_skip: int, num_chunks: int = 1, fingerprint: str | None = None
    ) -> None:
        self.parts, self.cache, self.clip_skip, self.num_chunks = parts, cache, clip_skip, num_chunks
        self.fingerprint = fingerprint or text_fingerprint(parts, cache)
        self.encoded = 0
        dtypes = sorted({str(next(e.parameters()).dtype) for e in parts.text_encoders.values()})
        self._facts = parts.family.name, self.fingerprint, clip_skip, num_chunks, dtypes
        self._memory: OrderedDict[str, Conditioning] = OrderedDict()
        self._bytes = 0
        self._kept: set[str] = set()
        self._stacks: Stacks | None = None
        self._rows: dict[str, int] = {}

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        """Returns the conditioning of B captions, the batch in front, on the device of the base."""
        if self._stacks and all(caption in self._rows for caption in captions):
            return self._stacks.rows([(self._rows[caption], 0) for caption in captions])
        each = [self._states(caption) for caption in captions]
        return {name: torch.stack([states[name] for states in each]).to(self.parts.device) for name in each[0]}

    @property
    def together(self) -> int:
        """How many captions are encoded at once."""
        return 1 if self.parts.device.type == "cpu" else BATCH

    def preload(self, captions: Iterable[str]) -> bool:
        """Encodes captions that will be asked for, each once, and keeps them on the disk.

        Returns:
            Whether all are in memory now; where they are too many, the others will be read from the disk.
        """
        distinct = list(dict.fromkeys(captions))
        missing = [caption for caption in distinct if not self._recall(caption)]
        for start in range(0, len(missing), self.together):
            batch = missing[start : start + self.together]
            for caption, states in zip(batch, self._encode(batch), strict=True):
                key = self._key(caption)
                self._remember(key, states)
                self._kept.add(key)
                self.cache.put(key, states)
        return all(self._key(caption) in self._memory for caption in distinct)

    def to_device(self, captions: Iterable[str], device: torch.device | str, budget_bytes: float = math.inf) -> bool:
        """Puts the states of captions into one tensor, so that a batch of them is a choice of rows; see `preload`.

        Args:
            captions: those that will be asked for most.
            device: where their states shall lie; the base's.
            budget_bytes: what they may take there. If they need more, nothing is done.

        Returns:
            Whether they lie there now.
        """
        distinct = list(dict.fromkeys(captions))
        if not distinct or not self.preload(distinct):
            return False
        states = [self._memory[self._key(caption)] for caption in distinct]
        if sum(map(_size, states)) > budget_bytes:
            return False
        self._stacks = Stacks([[one] for one in states], torch.device(device))
        self._rows = {caption: row for row, caption in enumerate(distinct)}
        return True

    def truncated(self, captions: Sequence[str]) -> list[str]:
        """Returns those captions that are longer than a text encoder can read; their end has no effect."""
        return [caption for caption in captions if unseen(self.parts, caption, self.num_chunks)]

    def _states(self, caption: str) -> Conditioning:
        key = self._key(caption)
        if key in self._memory:
            self._memory.move_to_end(key)
            if key not in self._kept:
                self._kept.add(key)
                self.cache.put(key, self._memory[key])
            return self._memory[key]
        if not self._recall(caption):
            self._remember(key, self._encode([caption])[0])
        return self._memory[key]

    def _recall(self, caption: str) -> bool:
        """Looks for a caption in memory and on the disk, and tells whether it is in memory now."""
        key = self._key(caption)
        if key not in self._memory:
            states = self.cache.get(key)
            if states is None:
                return False
            self._kept.add(key)
            self._remember(key, states)
        return True

    def _remember(self, key: str, states: Conditioning) -> None:
        self._memory[key] = states
        self._bytes += _size(states)
        while self._bytes > MEMORY_BYTES and len(self._memory) > 1:
            self._bytes -= _size(self._memory.popitem(last=False)[1])

    def _key(self, caption: str) -> str:
        return Cache.key("text", _VERSION, self._facts, caption)

    def _encode(self, captions: Sequence[str]) -> list[Conditioning]:
        encoders = self.parts.text_encoders.values()
        training = [encoder for encoder in encoders if encoder.training]
        for encoder in training:  # the loop sets train mode, but what is kept must not have dropout in it
            encoder.eval()
        # Without autocast, so that the states are a function of the weights and not of who asks.
        with torch.no_grad(), torch.autocast(self.parts.device.type, enabled=False):
            batch = self.parts.family.encode_prompts(self.parts, captions, self.clip_skip, num_chunks=self.num_chunks)
        for encoder in training:
            encoder.train()
        self.encoded += len(captions)
        own = {name: tensor.cpu() for name, tensor in batch.items()}
        return [{name: tensor[row].clone() for name, tensor in own.items()} for row in range(len(captions))]


def text_fingerprint(parts: Parts, cache: Cache | None = None) -> str:
    """Returns a hash of the weights, configurations and vocabularies that decide what a caption becomes."""
    encoders = {name: fingerprint(encoder, cache) for name, encoder in parts.text_encoders.items()}
    tokenizers = {name: _vocabulary(tokenizer) for name, tokenizer in parts.tokenizers.items()}
    return Cache.key(encoders, tokenizers)


def _vocabulary(tokenizer: Any) -> str:
    facts = {"length": tokenizer.model_max_length, "special": {k: str(v) for k, v in _special(tokenizer).items()}}
    if hasattr(tokenizer, "backend_tokenizer"):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # These two change with every call and are given again at the next.
        facts["rules"] = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    else:
        facts["vocabulary"] = tokenizer.get_vocab()
    return Cache.key(facts)


def _special(tokenizer: Any) -> dict[str, Any]:
    return dict(tokenizer.special_tokens_map)


def _size(states: Conditioning) -> int:
    return sum(_bytes(tensor) for tensor in states.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
