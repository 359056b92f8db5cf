"""Shows a cell's pictures to the judges; the answer is a number for each prompt, averaged over its pictures.

Legend: P prompts, S pictures of each prompt, N = P * S, D features, K judged styles.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdlora.data.cache import Cache
from tools.pretrain_nano.concepts import Concept
from tools.style_bench import metrics
from tools.style_bench.cells import Cell
from tools.style_bench.draw import to_floats
from tools.style_bench.experiment import write_json
from tools.style_bench.panel import UNJUDGED, UNSEEN, Panel
from tools.style_bench.pictures import EmojiPictures
from tools.style_bench.protocol import Task
from tools.style_bench.verdict import style_hits

Scores = dict[str, list[float | None]]
"""Column -> a number for each prompt, or for each validation picture ("loss"), or one ("kernel", "seconds")."""


def score_cell(panel: Panel, cell: Cell) -> Scores:
    """Returns a cell's scores, computed once for each version of the judges."""
    task = cell.task
    key = Cache.key(panel.digest, [c.code for c in task.learn])
    file = cell.folder / f"scores-{key[:12]}.json"
    if not file.is_file():
        drawn = cell.read()
        training = cell.method.learns(task) if cell.method.learns else task.learn
        scores = score(panel, task, drawn["pictures"], cell.method.styles(task), training)
        if "leak" in drawn:
            hits, _ = _style_hits(panel, to_floats(drawn["leak"]), cell.method.styles(task))
            scores["leak"] = hits.float().tolist()
        if "losses" in drawn:
            scores["loss"] = drawn["losses"].tolist()
        if "seconds" in cell.facts():
            scores["seconds"] = [cell.facts()["seconds"]]
        write_json(file, scores)
    return json.loads(file.read_text(encoding="utf-8"))


def score_real(panel: Panel, task: Task) -> Scores:
    """Returns the scores of the real pictures of the prompts in the target style: what the judges can tell at best."""
    style, there = task.style.id, [panel.pictures.has(task.style.id, c.code) for c in task.prompts]
    drawn = tuple(c for c, has in zip(task.prompts, there, strict=True) if has)
    levels = (panel.pictures.tensor(style, [c.code for c in drawn]) * 255).round().to(torch.uint8)
    pictures = levels.permute(0, 2, 3, 1)[:, None].contiguous()
    some = score(panel, replace(task, prompts=drawn), pictures, [style] * len(drawn), (), without=drawn)
    whole: Scores = {}
    for name, values in some.items():
        rest = iter(values)
        whole[name] = values if name == "kernel" else [next(rest) if has else None for has in there]
    return whole


def score(
    panel: Panel,
    task: Task,
    pictures: Tensor,
    styles: Sequence[str],
    training: Sequence[Concept],
    without: Sequence[Concept] = (),
) -> Scores:
    """Measures pictures.

    Args:
        panel: the judges.
        task: what was to be drawn.
        pictures: uint8, (P, S, 128, 128, 3).
        styles: the style that each prompt asks for.
        training: pictures of the target style that may have been copied; none: copies are not looked for.
        without: concepts whose real pictures the kernel distance shall not use: those that are shown.
    """
    count = pictures.shape[1]
    floats = to_floats(pictures)
    asked = [style for style in styles for _ in range(count)]
    hits, probability = _style_hits(panel, floats, asked)
    ranks = panel.ranks(floats, asked, [c.base for c in task.prompts for _ in range(count)])
    features = panel.judges.style_features(floats)
    columns = {
        "style": hits,
        "probability": probability,
        "top1": ranks == 0,
        "top5": ranks < 5,
        "joint": hits & (ranks < 5),
        "win": _wins(panel, task.prompts, features, asked, count),
    }
    small = metrics.thumbnails(floats)
    in_target = set(styles) == {task.style.id}
    if training and in_target:
        columns["copy"] = _copies(panel.pictures, task, small, training)
    scores: Scores = {name: _by_prompt(values, count) for name, values in columns.items()}
    if count > 1:
        scores["diversity"] = metrics.diversity(small.unflatten(0, (-1, count))).tolist()
    if in_target:
        scores["kernel"] = [metrics.kernel_distance(features, _real_features(panel, task, without))]
    return scores


def _style_hits(panel: Panel, pictures: Tensor, styles: Sequence[str]) -> tuple[Tensor, Tensor]:
    return style_hits(panel.judges.style_logits(pictures), panel.judges.styles, styles)


def _wins(panel: Panel, prompts: tuple[Concept, ...], features: Tensor, asked: Sequence[str], count: int) -> Tensor:
    """Returns the paired wins, (N,), fp32, NaN where the asked style has no real picture of the concept."""
    real = {style: panel.real(style, prompts) for style in panel.styles}
    width = features.shape[1]
    tables = torch.stack([table.expand(-1, width) for table, _ in real.values()]).repeat_interleave(count, 1)
    there = torch.stack([exists for _, exists in real.values()]).repeat_interleave(count, 1)
    own = torch.tensor([panel.styles.index(style) for style in asked])
    rows = torch.arange(len(asked))
    others = there.clone()
    others[own, rows] = False
    wins = metrics.paired_win(features, tables[own, rows], tables, others).float()
    return wins.masked_fill(~there[own, rows], torch.nan)


def _copies(pictures: EmojiPictures, task: Task, small: Tensor, training: Sequence[Concept]) -> Tensor:
    style = task.style.id
    learned = metrics.moved_thumbnails(pictures.tensor(style, [c.code for c in training]))
    unseen = [c.code for c in pictures.concepts if c.split in UNSEEN and pictures.has(style, c.code)]
    threshold = metrics.copy_threshold(metrics.thumbnails(pictures.tensor(style, unseen)), learned)
    return metrics.copies(small, learned, threshold)


def _real_features(panel: Panel, task: Task, without: Sequence[Concept]) -> Tensor:
    """Returns features of the real pictures of the target style that nobody learned from, (M, D)."""
    unseen = tuple(c for c in panel.pictures.concepts if c.split in UNJUDGED and c not in without)
    table, there = panel.real(task.style.id, unseen)
    return table[there]


def _by_prompt(values: Tensor, count: int) -> list[float | None]:
    means = values.float().unflatten(0, (-1, count)).mean(1)
    return [None if mean != mean else mean for mean in means.tolist()]
