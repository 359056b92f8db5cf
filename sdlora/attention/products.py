"""Attention for CPUs made of a few large matrix products in bf16, each at the full speed of oneDNN.

torch's own CPU kernel multiplies small blocks, which is slow for the narrow heads of Stable Diffusion, above all on the
way back. Here the scores of a block of rows are one product. What would be further passes over them is hidden in the
products: subtracting each row's shift and its mean gradient, and summing up its probabilities, are further columns of
the factors. What is left is one exponential and one multiplication for each score.

Legend: B batch, H heads, n queries, m keys, d head width, w widened head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = 64 << 20
"""Of scores at a time. Blocks of 4 to 64 MB are as fast as each other (4096 x 4096, 8 heads, two cores: 323 to 348 ms
forward and backward; 1 MB: 386 ms), and fewer blocks are fewer operations."""
SAMPLE = 16
"""Every how many keys one is looked at to guess a row's largest score."""

_LOG2_E = math.log2(math.e)


class _Pool:
    """Buffers for probabilities that are used again at the next step: new memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[Tensor]] = {}

    def take(self, *shape: int) -> Tensor:
        free = self._free.get(shape)
        return free.pop() if free else torch.empty(shape, dtype=torch.bfloat16)

    def give(self, buffer: Tensor) -> None:
        self._free.setdefault(tuple(buffer.shape), []).append(buffer)


_POOL = _Pool()


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Returns softmax(Q K^T / sqrt(d)) V; keeps the probabilities for the way back, 2 B H n m bytes.

    Args:
        query: (B, H, n, d), bf16, on the CPU.
        key: (B, H, m, d).
        value: (B, H, m, d).

    Raises:
        OverflowError: if a row's scores are so far apart that bf16 cannot hold their exponentials.

    Source: agrees with `torch.nn.functional.scaled_dot_product_attention`; the way back is that of Dao et al. 2022,
    arXiv:2205.14135, appendix B.2.
    """
    return _Attention.apply(query, key, value)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        n, d = query.shape[2:]
        scale = 1 / math.sqrt(d)
        q = query * (scale * _LOG2_E)
        # Scores are rounded to bf16, finely only near zero. So the largest of a row should lie there, more or less.
        shift = (q @ key[:, :, ::SAMPLE].mT).amax(-1, keepdim=True)
        q, k, v = _widened(q, shift), _widened(key, -1.0), _widened(value, 1.0, -1.0)
        scores = _POOL.take(q.shape[0], n, k.shape[1])
        mixed, output = _empty(query, q.shape, query.transpose(1, 2).shape)
        for some, parts in _blocks(scores):
            for part in parts:
                torch.bmm(q[part], k[some].mT, out=scores[part]).exp2_()
            torch.bmm(scores[some], v[some], out=mixed[some])
        mixed = mixed.unflatten(0, query.shape[:2])
        total = mixed[..., d : d + 1]  # each row's sum, from value's column of ones
        if not math.isfinite(total.amax().item()):
            _POOL.give(scores)
            raise OverflowError("attention scores are too far apart for products in bf16")
        output = output.transpose(1, 2)  # so that in memory tokens come first, as layers want them next
        torch.div(mixed[..., :d], total, out=output)
        ctx.save_for_backward(q, k, v, output, total)
        ctx.scores, ctx.scale = scores, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v, output, total = ctx.saved_tensors
        scores, ctx.scores = ctx.scores, None
        if scores is None:
            raise RuntimeError("attention's probabilities are used up in one backward pass; there cannot be a second")
        batch, heads, n, d = output.shape
        gradient = grad_outputs[0] / total
        g = _widened(gradient, 0.0, (gradient * output).sum(-1, keepdim=True))
        # Of key and value the transposes, for torch would copy a transposed block of scores first.
        of_text = batch, k.shape[1], heads, d
        dq, dk, dv, *results = _empty(q, q.shape, k.mT.shape, v.mT.shape, (batch, n, heads, d), of_text, of_text)
        for some, parts in _blocks(scores):
            torch.bmm(g[some].mT, scores[some], out=dv[some])
            for part in parts:
                scores[part].mul_(torch.bmm(g[part], v[some].mT))
            torch.bmm(scores[some], k[some], out=dq[some])
            torch.bmm(q[some].mT, scores[some], out=dk[some])
        _POOL.give(scores)
        gq, gk, gv = (x.transpose(1, 2) for x in results)
        torch.mul(dq.unflatten(0, (batch, heads))[..., :d], ctx.scale, out=gq)
        torch.mul(dk.mT.unflatten(0, (batch, heads))[..., :d], 1 / _LOG2_E, out=gk)
        gv.copy_(dv.mT.unflatten(0, (batch, heads))[..., :d])
        return gq, gk, gv


def _blocks(scores: Tensor) -> list[tuple[slice, list[tuple[slice, slice]]]]:
    """Cuts scores, (B H, n, m), into several heads at a time where they fit, else into rows of one head."""
    heads, n, m = scores.shape
    together = max(1, min(heads, BLOCK_BYTES // (2 * n * m)))
    rows = n if together > 1 else max(1, min(n, BLOCK_BYTES // (2 * m)))
    groups = [slice(h, h + together) for h in range(0, heads, together)]
    return [(some, [(some, slice(start, start + rows)) for start in range(0, n, rows)]) for some in groups]


def _empty(like: Tensor, *shapes: Sequence[int]) -> list[Tensor]:
    """Returns tensors without values that share one piece of memory."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = like.new_empty(sum(sizes)).split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _widened(x: Tensor, *columns: Tensor | float) -> Tensor:
    """Returns x, (B, H, n, d), with columns behind it and zeros up to a multiple of 16, as (B H, n, w)."""
    *shape, d = x.shape
    more = -(-(d + 2) // 16) * 16 - d - len(columns)
    tail = [c if isinstance(c, Tensor) else _constant(c, x.dtype).expand(*shape, 1) for c in columns]
    return torch.cat([x, *tail, _constant(0.0, x.dtype).expand(*shape, more)], -1).flatten(0, 1)


_CONSTANTS: dict[tuple[float, torch.dtype], Tensor] = {}


def _constant(value: float, dtype: torch.dtype) -> Tensor:
    if (value, dtype) not in _CONSTANTS:
        _CONSTANTS[value, dtype] = torch.full((1,), value, dtype=dtype)
    return _CONSTANTS[value, dtype]
