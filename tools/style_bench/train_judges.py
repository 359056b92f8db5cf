"""Makes both judges from nothing but the data set and EfficientNet-Lite0's ImageNet weights.

    python -m tools.style_bench.train_judges --data build/emoji
    python -m tools.style_bench.train_judges --data build/emoji --only style --go-on --steps 500 --rate 4e-4

The concept judge learns from the split "learn" and is a closed formula on frozen features; the style judge learns from
"validation" too and is trained by gradient descent. Times on one core are in README.md beside this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tools.style_bench import jitter
from tools.style_bench.discriminant import fit_concept_net
from tools.style_bench.imagenet import imagenet_weights
from tools.style_bench.judges import NONE, WEIGHTS, save
from tools.style_bench.networks import Lite0, StyleNet
from tools.style_bench.pictures import JUDGED_STYLES, EmojiPictures, Reconstructions, as_floats, lookalikes

CONCEPT_SPLITS, STYLE_SPLITS = ("learn",), ("learn", "validation")
"""Whose pictures the judges learn from. The concept judge's galleries are made of "validation", among others."""
BATCH = 64
SPOILED = 4
"""Pictures of a batch that are made to be in no style."""
STEPS = 2400
CLOSE_UP = 0.8
"""Share of the steps in which the body sees half-sized windows, which cost a quarter; in the others, whole pictures."""
WINDOW = 64
"""Side of such a window."""
RATE = 2e-3
REPORT = 100
"""Steps between two lines on the terminal."""


@dataclass(frozen=True)
class Pool:
    """The pictures of one style that a judge may learn from.

    Attributes:
        codes: which concepts.
        drawn: their pictures, (N, 3, 128, 128), uint8.
        decoded: the pictures after the round trip, likewise.
    """

    codes: list[str]
    drawn: Tensor
    decoded: Tensor


def pools(pictures: EmojiPictures, reconstructions: Reconstructions, splits: Sequence[str]) -> dict[str, Pool]:
    """Reads some splits, as drawn and after the VAE's round trip, without pictures that two styles share.

    Args:
        pictures: the data set.
        reconstructions: where round trips come from.
        splits: whose concepts.
    """
    without = lookalikes(pictures, splits)
    print(f"{len(without)} pictures look the same in two styles; the judges do not learn from them", flush=True)
    found = {}
    for style in JUDGED_STYLES:
        every = [concept.code for concept in pictures.of(style, splits)]
        codes = [code for code in every if (style, code) not in without]
        found[style] = Pool(codes, pictures.bytes(style, codes), reconstructions.bytes(style, codes))
    return found


def train_style_net(
    pool: dict[str, Pool], start: dict[str, Tensor], steps: int, rate: float = RATE, seed: int = 0
) -> StyleNet:
    """Returns a trained style judge.

    Half of what it sees has taken the round trip. Size, place, sharpness and, slightly, colour vary, so that none of
    them alone gives a style away.

    Args:
        pool: the pictures by style.
        start: weights of `networks.Lite0`, or those of a style judge to go on with.
        steps: batches to learn from.
        rate: the highest learning rate; it rises to it, and then falls to zero.
        seed: of everything that is left to chance.
    """
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = StyleNet(len(JUDGED_STYLES) + 1)
    if start.keys() == net.state_dict().keys():
        net.load_state_dict(start)
    else:
        load_body(net.body, start)
        sample = [as_floats(source[::4]) for style in pool.values() for source in (style.drawn, style.decoded)]
        net.get_used_to(torch.cat(sample))
    net = net.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    began, right, losses = time.monotonic(), 0.0, 0.0
    for step in range(1, steps + 1):
        views, styles = _batch(pool, rng)
        seen = _windows(views, rng) if step <= CLOSE_UP * steps else views
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(views, seen.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), styles, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right += (logits.argmax(1) == styles).float().mean().item() / REPORT
        losses += loss.item() / REPORT
        if step % REPORT == 0:
            spent = time.monotonic() - began
            print(f"step {step} of {steps}: loss {losses:.3f}, right {right:.1%}, {spent:.0f} s", flush=True)
            right = losses = 0.0
    return net.eval()


def _batch(pool: dict[str, Pool], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws styles evenly and a picture of each; returns views and indices of styles, those of spoiled views last."""
    styles = torch.randint(len(JUDGED_STYLES), (BATCH,), generator=rng)
    chosen = []
    for n, style in enumerate(styles.tolist()):
        source = pool[JUDGED_STYLES[style]]
        source = source.decoded if n % 2 else source.drawn
        chosen.append(source[int(torch.randint(len(source), (), generator=rng))])
    views = as_floats(torch.stack(chosen))
    views = jitter.moved(views, rng, smallest=0.85, largest=1.15, turn=2, mirror=True)
    views = jitter.roughened(jitter.recoloured(views, rng, 0.025), rng, blur=0.6, noise=0.015)
    views[-SPOILED:] = jitter.spoiled(views[-SPOILED:], rng)
    styles[-SPOILED:] = len(JUDGED_STYLES)
    return views, styles


def _windows(views: Tensor, rng: torch.Generator) -> Tensor:
    """Cuts a window out of each view, (N, 3, WINDOW, WINDOW), at places drawn evenly."""
    corners = torch.randint(views.shape[-1] - WINDOW + 1, (len(views), 2), generator=rng).tolist()
    cuts = [view[:, y : y + WINDOW, x : x + WINDOW] for view, (y, x) in zip(views, corners, strict=True)]
    return torch.stack(cuts)


def load_body(body: Lite0, start: dict[str, Tensor]) -> None:
    """Copies the weights of as many blocks as the body has."""
    wanted = body.state_dict()
    body.load_state_dict({key: value for key, value in start.items() if key in wanted})


def main() -> None:
    """Trains and writes the weights."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.style_bench.train_judges", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--cache", type=Path, help="folder for round trips and the download; default: DATA/judges")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder of the weights")
    parser.add_argument("--only", choices=("style", "concept"), help="train one judge")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches that the style judge learns from")
    parser.add_argument("--rate", type=float, default=RATE, help="its highest learning rate")
    parser.add_argument("--go-on", action="store_true", help="begin with the style judge in OUT, not with ImageNet's")
    parser.add_argument("--seed", type=int, default=0, help="of the style judge's training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pictures = EmojiPictures(arguments.data)
    cache = arguments.cache or pictures.folder / "judges"
    cache.expanduser().mkdir(parents=True, exist_ok=True)
    start = imagenet_weights(cache)
    reconstructions = Reconstructions(pictures, cache)
    if arguments.only != "style":
        pool = pools(pictures, reconstructions, CONCEPT_SPLITS)
        began = time.process_time()
        net = fit_concept_net(pool, start)
        save(net, arguments.out / "concept.safetensors", {})
        print(f"concept judge: {time.process_time() - began:.0f} s of one core", flush=True)
    if arguments.only != "concept":
        file = arguments.out / "style.safetensors"
        start = load_file(file) if arguments.go_on else start
        pool = pools(pictures, reconstructions, STYLE_SPLITS)
        began = time.process_time()
        net = train_style_net(pool, start, arguments.steps, arguments.rate, arguments.seed)
        save(net, file, {"styles": ",".join((*JUDGED_STYLES, NONE))})
        print(f"style judge: {time.process_time() - began:.0f} s of one core", flush=True)


if __name__ == "__main__":
    main()
