"""`python -m tools.style_bench`: teaches held-out styles, draws, judges, and writes a report. See BENCH.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sdlora.allocator import keep_freed_memory
from sdlora.config import Config
from sdlora.config_io import load_config
from sdlora.data.cache import Cache
from sdlora.errors import ConfigError, SdloraError
from sdlora.families import resolve_base
from sdlora.training.progress import PlainReporter
from tools.style_bench.cells import Cell
from tools.style_bench.experiment import Experiment, code_digest, write_json
from tools.style_bench.judges import Judges
from tools.style_bench.measure import Scores, score_cell, score_real
from tools.style_bench.methods import METHODS
from tools.style_bench.options import compares, parse
from tools.style_bench.panel import Panel
from tools.style_bench.pictures import EmojiPictures
from tools.style_bench.references import FULL, ORACLE, Tuning
from tools.style_bench.report import REAL, write_report, write_sheet
from tools.style_bench.sweep import UNCHANGED, variants, write_sweep

TRIGGER, TRIGGER_PLACE = "sks style", "end"
"""What every caption gets, and where, unless the settings say otherwise: "castle, sks style", as the base's own
captions are made (`tools/pretrain_nano/captions.py`); what it is for is measured by the leak without it."""
QUICK_STEPS = 250
"""Training steps of `--quick`, unless the settings say otherwise."""
NEEDED = ("base", "own")
"""Always drawn: other numbers are measured against them."""
EXAMINATION = tuple(f"{name}.py" for name in ("gates", "verdict", "pictures", "judges", "networks", "surface"))
"""The parts of the bench that decide what the judges' gates ask and hear."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench; returns the exit code: 0, 2 for what the person can fix, 130 if stopped."""
    options = parse(arguments)
    try:
        return _sweep(options) if compares(options) else _run(options)
    except (SdloraError, ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; the same command goes on with what is not finished.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    experiment = _experiment(options)
    panel, failure = _panel(experiment, options.despite_gates)
    scores: dict[str, dict[str, list[Scores]]] = {}
    for style in options.style:
        of_style: dict[str, list[Scores]] = {}
        first: dict[str, Cell] = {}
        for cell in _cells(experiment, style, options):
            if (found := _finished(cell, panel, cell.method.title, options.report)) is not None:
                of_style.setdefault(cell.method.id, []).append(found)
                first.setdefault(cell.method.id, cell)
        if not first:
            continue
        scores[style] = {**of_style, REAL: [score_real(panel, next(iter(first.values())).task)]}
        write_sheet(options.out, options.name, first)
        target = write_report(options.out, options.name, experiment, scores, panel.digest, failure)
    if not scores:
        raise ConfigError(f"nothing is drawn yet with these settings in {options.work}; leave out --report")
    print(f"\n{target.read_text(encoding='utf-8').split('## What')[0]}\n{target}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
    given = {name: _experiment(options, more) for name, more in variants(options.vary).items()}
    unchanged = given[UNCHANGED]
    panel, failure = _panel(unchanged, options.despite_gates)
    scores: dict[str, dict[str, list[Scores]]] = {}
    for style in options.style:
        tasks = [unchanged.task(style, subset) for subset in range(options.subsets)]
        cells = {
            name + how: [Cell(one, task, METHODS["lora"], **use) for task in tasks]
            for name, one in given.items()
            for how, use in _uses(options).items()
        }
        cells |= {id: [Cell(unchanged, tasks[0], METHODS[id])] for id in NEEDED}
        found = {n: [_finished(cell, panel, n, options.report) for cell in several] for n, several in cells.items()}
        done = {name: [s for s in several if s is not None] for name, several in found.items()}
        missing = [name for name, several in done.items() if len(several) < len(found[name])]
        if missing:
            raise ConfigError(f"{style}: not drawn yet: {', '.join(missing)}; leave out --report")
        scores[style] = done
    target = write_sweep(options.out, options.name, unchanged, scores, panel.digest, failure)
    print(f"\n{target.read_text(encoding='utf-8')}\n{target}")
    return 0


def _uses(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Lists how each LoRA is used, what is said of it after its name, and what its cell is told."""
    strengths = {f", strength {strength:g}": {"strength": strength} for strength in options.strengths}
    return {"": {}, **strengths, **{f", CFG {cfg:g}": {"cfg": cfg} for cfg in options.cfg}}


def _finished(cell: Cell, panel: Panel, title: str, as_it_is: bool) -> Scores | None:
    """Does what is not done yet of a cell, unless it shall stay as it is; returns its scores, or `None`."""
    if not as_it_is:
        print(f"== {cell.task.style.id}, subset {cell.task.subset}: {title}", flush=True)
        threads = torch.get_num_threads()
        cell.run(PlainReporter(30.0))
        torch.set_num_threads(threads)  # a base that is trained or drawn with may have chosen fewer
    return score_cell(panel, cell) if cell.is_drawn else None


def _cells(experiment: Experiment, style: str, options: argparse.Namespace) -> Iterator[Cell]:
    wanted = {*options.methods, *options.references, *NEEDED}
    for subset in range(options.subsets):
        task = experiment.task(style, subset)
        for method in METHODS.values():
            if method.id in wanted and (method.per_subset or subset == 0):
                yield Cell(experiment, task, method)


def _panel(experiment: Experiment, despite_gates: bool) -> tuple[Panel, str]:
    """Loads the judges, and makes sure that they deserve to be believed.

    Returns:
        The panel, and what to warn of in the report; "" if the judges have passed.

    Raises:
        ConfigError: if they fail their own examination, unless `despite_gates`.
    """
    panel = Panel.open(experiment.pictures, experiment.work / "real")
    asked = Cache.key(panel.digest, code_digest(Path(__file__).parent, EXAMINATION))
    file = experiment.work / f"gates-{asked[:12]}.json"
    return panel, _examine(panel.judges, experiment.pictures, file, despite_gates)


def _examine(judges: Judges, pictures: EmojiPictures, file: Path, despite_gates: bool = False) -> str:
    """Lets the judges through their gates, once for each version of them: it takes minutes.

    Args:
        judges: the judges.
        pictures: the data set.
        file: remembers what came out; if it is there, nothing is done again. Its name says what was asked of whom.
        despite_gates: whether to go on if they fail.

    Returns:
        "" if they passed, else how they failed.

    Raises:
        ConfigError: if they fail, unless `despite_gates`.
    """
    from tools.style_bench.gates import check

    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
    else:
        gates = check(judges, pictures)
        found = {"passed": gates.passed, "text": str(gates)}
        write_json(file, found)
    if found["passed"]:
        return ""
    if not despite_gates:
        raise ConfigError(f"the judges failed their gates, so nothing that they say counts: {found['text']}")
    return found["text"]


def _experiment(options: argparse.Namespace, more: Sequence[str] = ()) -> Experiment:
    config = _config(options, more)
    return Experiment(
        pictures=EmojiPictures(options.data),
        base=resolve_base(config.base.model),
        config=config,
        images=options.images,
        half=options.prompts,
        num_prompts=options.num_prompts,
        num_seeds=options.num_seeds,
        full=Tuning(options.full_steps, options.full_rate, FULL.batch_size),
        oracle=Tuning(options.oracle_steps, options.oracle_rate, ORACLE.batch_size),
        work=options.work,
    )


def _config(options: argparse.Namespace, more: Sequence[str]) -> Config:
    """Builds the LoRA's settings: sdlora's defaults, then file, `--set` and `more`, then what the bench needs.

    Raises:
        ConfigError: if the settings are wrong, or say where pictures come from or files go to.
    """
    config = load_config(options.config, {"base.model": options.base} if options.base else None, (*options.set, *more))
    placed = sorted({"images"} & config.data.model_fields_set | {"output", "name"} & config.output.model_fields_set)
    if placed:
        raise ConfigError(f"the bench decides about {', '.join(placed)}; leave it out of --config and --set")
    if config.base.model == "auto":
        config = _with(config, "base", model="nano")
    if "trigger" not in config.data.model_fields_set:
        place = {} if "trigger_place" in config.data.model_fields_set else {"trigger_place": TRIGGER_PLACE}
        config = _with(config, "data", trigger=TRIGGER, **place)
    if options.quick and config.train.steps is None and config.train.epochs is None:
        config = _with(config, "train", steps=QUICK_STEPS)
    return config


def _with(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
