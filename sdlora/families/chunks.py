"""Texts of any length for an encoder that reads 75 tokens: they are cut into chunks, and the states are put in a row.

The cut is the WebUI's, for prompts and captions alike: a chunk that overflows ends at the last comma if one is near.
Prompts can weigh their parts (`emphasis.py`); the states are multiplied by the weights after the encoder has run.

Legend: B texts, n chunks, L tokens of a chunk with its two marks (77), D width of the states, P of the pooled state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdlora.errors import ModelError
from sdlora.families.emphasis import BREAK, parse_emphasis

CHUNK = 75
"""Tokens of a chunk, its two marks not counted."""
COMMA_BACKTRACK = 20
"""A comma at most this many tokens before the end of a full chunk ends it; the WebUI's `comma_padding_backtrack`."""


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """One text as an encoder reads it.

    Attributes:
        ids: n rows of L token ids: start mark, tokens, end mark, padding.
        weights: of the same tokens; 1 for marks and padding.
        empty: L token ids of a chunk without text, with which shorter texts are filled up.
        unseen: the end of the text that found no chunk, without brackets and numbers; mostly "".
    """

    ids: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    empty: tuple[int, ...]
    unseen: str


class _Token(NamedTuple):
    id: int
    weight: float
    part: int
    """Index of the part of the text that it stands in."""
    start: int
    """Where in that part it begins, in characters."""


def chunk(tokenizer: Any, text: str, *, emphasis: bool, max_chunks: int | None) -> Chunked:
    """Cuts a text into chunks of `tokenizer.model_max_length` tokens, two of which are marks.

    A text without tokens is one empty chunk. In the last chunk that `max_chunks` allows nothing is left free for the
    sake of a comma, so with one chunk the ids are those of the tokenizer's own padding and truncation.

    Args:
        tokenizer: a CLIPTokenizer of transformers 5; its marks, padding token and `,</w>` are used.
        text: a prompt or caption.
        emphasis: whether brackets weigh words and BREAK begins a chunk; else both are plain words.
        max_chunks: at least 1; `None` sets no limit.

    Source: `tokenize_line` and `process_tokens` in `modules/sd_hijack_clip.py` of AUTOMATIC1111's WebUI 1.10.1.
    """
    parts = parse_emphasis(text) if emphasis else [(text, 1.0)]
    size = tokenizer.model_max_length - 2
    comma = tokenizer.backend_tokenizer.token_to_id(",</w>")
    chunks = _cut(_tokens(tokenizer, parts), size, comma, max_chunks)
    seen = chunks[:max_chunks]
    unseen = next((token for row in chunks[len(seen) :] for token in row), None)
    return Chunked(
        ids=tuple(_framed(tokenizer, [token.id for token in row], size) for row in seen),
        weights=tuple((1.0, *(t.weight for t in row), *[1.0] * (size + 1 - len(row))) for row in seen),
        empty=_framed(tokenizer, [], size),
        unseen="" if unseen is None else _rest(parts, unseen),
    )


def num_tokens(tokenizer: Any, text: str) -> int:
    """Returns how many tokens a text has, brackets counted as words, the two marks not counted."""
    return sum(1 for _ in _tokens(tokenizer, [(text, 1.0)]))


def encode_chunks(
    encoder: Any,
    chunked: Sequence[Chunked],
    *,
    layer: int,
    normed: bool,
    pooled: bool,
    device: torch.device | str,
    min_chunks: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Encodes chunked texts, all in one call of the encoder; gradients flow into it.

    Shorter texts are filled up with empty chunks. Where a weight is not 1, the states of a chunk are multiplied by
    the weights, and then all of them by what brings their mean back. Weights do not touch the pooled state.

    Args:
        encoder: CLIPTextModel or CLIPTextModelWithProjection of transformers 5.
        chunked: B texts.
        layer: which states to take: 1 those of the last layer, n those of the n-th from the end.
        normed: whether the states go through the final layer norm.
        pooled: whether to return the pooled state; the encoder must be a CLIPTextModelWithProjection.
        device: where the encoder lies.
        min_chunks: texts are filled up to at least this many.

    Returns:
        The states, (B, n L, D), and the projected last state of each first chunk's end mark, (B, P), or `None`.

    Raises:
        ModelError: if the encoder has fewer layers.

    Source: `process_tokens` in `modules/sd_hijack_clip.py` and `EmphasisOriginal` in `modules/sd_emphasis.py` of
        AUTOMATIC1111's WebUI 1.10.1, which gets one text at a time: a mean is that of one chunk of one text.
    """
    layers = encoder.config.num_hidden_layers
    if layer > layers:
        raise ModelError(f"clip skip {layer} is too deep: the text encoder has {layers} layers")
    count = max(min_chunks, *(len(text.ids) for text in chunked))
    ids = [row for text in chunked for row in (*text.ids, *[text.empty] * (count - len(text.ids)))]
    output = encoder(torch.tensor(ids, device=device), output_hidden_states=layer > 1 or not normed)
    if layer == 1 and normed:
        states = output.last_hidden_state
    else:
        states = output.hidden_states[-layer]
        if normed:
            # A CLIPTextModel of transformers 5 is its own text model.
            states = getattr(encoder, "text_model", encoder).final_layer_norm(states)
    states = _weighted(states, chunked, count).reshape(len(chunked), -1, states.shape[-1])
    if not pooled:
        return states, None
    return states, output.text_embeds.reshape(len(chunked), count, -1)[:, 0]


def _tokens(tokenizer: Any, parts: Sequence[tuple[str, float]]) -> Iterator[_Token | None]:
    """Yields the tokens of all parts in order, `None` for a BREAK."""
    encoded = tokenizer(
        [text for text, _ in parts],
        add_special_tokens=False,
        split_special_tokens=True,  # or "!", the padding of OpenCLIP's tokenizers, would be no exclamation mark
        padding=False,
        truncation=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for number, part in enumerate(parts):
        if part == BREAK:
            yield None
            continue
        for token, (start, _) in zip(encoded.input_ids[number], encoded.offset_mapping[number], strict=True):
            yield _Token(token, part[1], number, start)


def _cut(tokens: Iterable[_Token | None], size: int, comma: int | None, max_chunks: int | None) -> list[list[_Token]]:
    """Distributes tokens over chunks of at most `size`."""
    chunks: list[list[_Token]] = [[]]
    last_comma: int | None = None
    for token in tokens:
        row = chunks[-1]
        if token is None:
            chunks.append([])
            last_comma = None
            continue
        if len(row) == size:
            end = size
            last = len(chunks) == max_chunks
            if last_comma is not None and size - last_comma <= COMMA_BACKTRACK and token.id != comma and not last:
                end = last_comma + 1
            chunks.append(row[end:])
            del row[end:]
            last_comma = None
        elif token.id == comma:
            last_comma = len(row)
        chunks[-1].append(token)
    if len(chunks) > 1 and not chunks[-1]:  # a BREAK at the end begins nothing
        chunks.pop()
    return chunks


def _framed(tokenizer: Any, ids: Sequence[int], size: int) -> tuple[int, ...]:
    padding = [tokenizer.pad_token_id] * (size - len(ids))
    return (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *padding)


def _rest(parts: Sequence[tuple[str, float]], first: _Token) -> str:
    """Returns the text from a token on."""
    later = [" " if part == BREAK else part[0] for part in parts[first.part + 1 :]]
    return "".join([parts[first.part][0][first.start :], *later]).strip()


def _weighted(states: Tensor, chunked: Sequence[Chunked], count: int) -> Tensor:
    """Multiplies states, (B n, L, D), by their weights and restores each chunk's mean, computed in fp32."""
    if all(weight == 1 for text in chunked for row in text.weights for weight in row):
        return states
    ones = (1.0,) * states.shape[1]
    rows = [row for text in chunked for row in (*text.weights, *[ones] * (count - len(text.weights)))]
    before = states.float()
    after = before * torch.tensor(rows, device=states.device)[..., None]
    old, new = (s.mean(dim=(1, 2), keepdim=True) for s in (before, after))
    factor = torch.where(new == 0, 1.0, old / new)  # a mean of exactly 0 can be brought to nothing else
    return (after * factor).to(states.dtype)
