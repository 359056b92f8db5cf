"""The bench's command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tools.pretrain_nano.sources import HELD_OUT_STYLES
from tools.style_bench.draw import CFG
from tools.style_bench.methods import METHODS
from tools.style_bench.protocol import HALVES
from tools.style_bench.references import FULL, ORACLE

LEARNED = ("lora",)
REFERENCES = ("base", "words", "full", "oracle")
QUICK_REFERENCES = ("base", "words")
QUICK_SIZE, FULL_SIZE = (24, 2), (100, 4)
"""Prompts, and pictures of each: with `--quick`, and without."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, and fills in what depends on `--quick`; exits with a usage message if it is wrong."""
    options = _parser().parse_args(arguments)
    quick = options.quick
    styles = options.style or HELD_OUT_STYLES[:1]
    options.style = list(HELD_OUT_STYLES if "all" in styles else dict.fromkeys(styles))
    options.subsets = options.subsets or (1 if quick else 3)
    options.prompts = options.prompts or ("tune" if quick else "final")
    options.name = options.name or ("sweep" if compares(options) else "quick" if quick else "report")
    prompts, seeds = QUICK_SIZE if quick else FULL_SIZE
    options.num_prompts = options.num_prompts or prompts
    options.num_seeds = options.num_seeds or seeds
    if options.references is None:
        options.references = QUICK_REFERENCES if quick else REFERENCES
    return options


def _parser() -> argparse.ArgumentParser:
    what = "Teaches styles that the base has never seen, draws, judges, and reports. See BENCH.md beside this program."
    parser = argparse.ArgumentParser(prog="python -m tools.style_bench", description=what)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the data set built by tools.pretrain_nano.build")
    styles = [*HELD_OUT_STYLES, "all"]
    add("--style", action="append", choices=styles, help=f"held-out style, repeatable; default {HELD_OUT_STYLES[0]}")
    add("--images", type=_positive, default=30, metavar="N", help="pictures to learn from; default 30")
    add("--subsets", type=_positive, metavar="N", help="choices of these pictures; default 3, with --quick 1")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting of the LoRA, repeatable")
    add("--config", type=Path, metavar="FILE.toml", help="settings of the LoRA")
    add("--base", metavar="nano|FOLDER", help="default: the configuration's, else nano")
    add("--prompts", choices=HALVES, help="tune: to choose settings; final: to report. Default final, --quick: tune")
    add("--quick", action="store_true", help="24 prompts x 2 seeds, 1 subset, base and words only: under 5 minutes")
    add("--methods", type=_names, default=LEARNED, help="what besides the references is drawn; default lora")
    add("--references", type=_names, help="of base,words,full,oracle; default all, with --quick base,words")
    add("--full-steps", type=_positive, default=FULL.steps, help=f"steps of full fine-tuning; default {FULL.steps}")
    add("--full-rate", type=_rate, default=FULL.rate, help=f"its learning rate; default {FULL.rate:g}")
    add("--oracle-steps", type=_positive, default=ORACLE.steps, help=f"steps of the oracle; default {ORACLE.steps}")
    add("--oracle-rate", type=_rate, default=ORACLE.rate, help=f"its learning rate; default {ORACLE.rate:g}")
    add("--num-prompts", type=_positive, metavar="P", help="prompts that are drawn; default 100, with --quick 24")
    add("--num-seeds", type=_positive, metavar="S", help="pictures of each; default 4, with --quick 2")
    vary = "compare LoRAs, each with one of these values and the rest unchanged; repeatable"
    add("--vary", action="append", default=[], metavar="SECTION.KEY=VALUE,VALUE", help=vary)
    add("--strengths", type=_strengths, default=(), help="compare the LoRAs at these strengths too, e.g. 0.6,0.8,1.2")
    add("--cfg", type=_scales, default=(), help=f"compare the LoRAs at these CFG scales too, e.g. 2,4; usual: {CFG:g}")
    add("--report", action="store_true", help="learn and draw nothing: report what is finished with these settings")
    add("--despite-gates", action="store_true", help="report although the judges fail; the report then says so first")
    add("--work", type=Path, default=Path("runs/style-bench"), help="finished cells; default runs/style-bench")
    add("--out", type=Path, default=Path("benchmarks/style"), help="the report; default benchmarks/style")
    add("--name", help="stem of the report's files; default report, with --quick quick")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is none of {', '.join(METHODS)}")
    return names


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < 1:
        raise argparse.ArgumentTypeError(f"a learning rate lies between 0 and 1, got {text}")
    return rate


def _strengths(text: str) -> tuple[float, ...]:
    strengths = tuple(float(part) for part in text.split(","))
    if not all(0 < strength <= 4 and strength != 1 for strength in strengths):
        raise argparse.ArgumentTypeError(f"strengths lie above 0, at most 4, and 1 is always there; got {text}")
    return strengths


def _scales(text: str) -> tuple[float, ...]:
    scales = tuple(float(part) for part in text.split(","))
    if not all(1 <= scale <= 50 and scale != CFG for scale in scales):
        raise argparse.ArgumentTypeError(f"CFG scales lie from 1 to 50, and {CFG:g} is always there; got {text}")
    return scales


def compares(options: argparse.Namespace) -> bool:
    """Whether settings or uses of a LoRA are compared, rather than methods."""
    return bool(options.vary or options.strengths or options.cfg)
