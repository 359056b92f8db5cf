"""What a batch's captions become: composed anew at every use, encoded, from the cache where the encoder is frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdlora.config import Config
from sdlora.data.cache import Cache
from sdlora.data.captions import compose_for
from sdlora.data.folder import Example
from sdlora.data.text import TextStates
from sdlora.diffusion.noise import generator
from sdlora.families import Conditioning, Parts
from sdlora.families.chunks import CHUNK
from sdlora.families.text import clip_skip_notes


class Texts:
    """Turns the captions of a batch into conditioning.

    Args:
        parts: the base. Cached states are those of the bare encoder; one that trains is encoded live.
        config: how captions are composed and whether the encoder trains.
        cache: where states are kept.
        total_steps: of the run; a share of them is `lora.text_encoder_stop`.

    Attributes:
        stops: the step from which on the text encoders learn no more.
        notes: what the user should know of how captions are read, a sentence each.
    """

    def __init__(self, parts: Parts, config: Config, cache: Cache, total_steps: int) -> None:
        self.parts, self.config = parts, config
        self.num_chunks = config.base.max_tokens // CHUNK
        self.states = TextStates(parts, cache, config.base.clip_skip, self.num_chunks)
        self.notes = clip_skip_notes(parts, config.base.clip_skip)
        self.stops = round(config.lora.text_encoder_stop * total_steps)

    def __call__(self, examples: Sequence[Example], step: int, positions: Sequence[int]) -> Conditioning:
        """Encodes the captions of a batch.

        Args:
            examples: B pictures.
            step: counted from 0.
            positions: number of each sample within the step; shuffling and dropout are functions of (seed, step,
                position).
        """
        texts = [self.compose(e, step, position) for e, position in zip(examples, positions, strict=True)]
        if not self.config.lora.text_encoder:
            states = self.states(texts)
            return {name: x.to(self.parts.device, self.parts.dtype) for name, x in states.items()}
        with torch.set_grad_enabled(step < self.stops):
            skip = self.config.base.clip_skip
            return self.parts.family.encode_prompts(self.parts, texts, skip, num_chunks=self.num_chunks)

    def compose(self, example: Example, step: int, position: int) -> str:
        """Returns the caption of an example as it is used at a step."""
        data, rng = self.config.data, generator(self.config.train.seed, "caption", step, position)
        return self._composed(example, rng, data.shuffle_tags, data.keep_tags, data.caption_dropout)

    def whole(self, example: Example) -> str:
        """Returns the caption of an example with nothing shuffled or left out."""
        return self._composed(example, generator("length"))

    def _composed(
        self, example: Example, rng: torch.Generator, shuffle: bool = False, keep: int = 0, dropout: float = 0.0
    ) -> str:
        return compose_for(self.config.data, example.caption, shuffle=shuffle, keep=keep, dropout=dropout, rng=rng)

    def overlong(self, examples: Sequence[Example]) -> list[str]:
        """Returns the names of pictures whose caption is longer than the text encoder can read."""
        whole = {example.path.name: self.whole(example) for example in examples}
        cut = set(self.states.truncated(list(whole.values())))
        return [name for name, text in whole.items() if text in cut]
