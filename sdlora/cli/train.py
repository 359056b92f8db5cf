"""`sdlora train`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from sdlora.cli.options import all_help, given, setting_options
from sdlora.cli.processes import is_one_of_several, start, started_here, stop_with_parent, this_command
from sdlora.cli.startup import import_models
from sdlora.config import Config
from sdlora.config_io import load_config


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        click.echo(all_help())
        ctx.exit()


@click.command("train", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="a TOML file of settings")
@click.option("--resume", type=click.Path(path_type=Path), help="go on with the run in this folder", metavar="RUN")
@click.option(
    "--processes", type=click.IntRange(1, 1024), hidden=True, help="processes that train together", metavar="N"
)
@click.option("--set", "assignments", multiple=True, hidden=True, help="section.key=value")
@click.option(
    "--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="list every setting"
)
def command(
    config_file: Path | None, resume: Path | None, processes: int | None, assignments: tuple[str, ...], **values: Any
) -> None:
    """Learn a style from a folder of pictures.

    \b
    sdlora train --images ./style_dir --rank 16
    sdlora train --images ./style_dir --trigger mystyle --epochs 20
    sdlora train --config style.toml --set optimizer.learning_rate=5e-5
    sdlora train --resume runs/style_dir-20260131-120000
    sdlora train --images ./style_dir --processes 2     one for each GPU; each takes batches of --batch-size

    Pictures may lie flat, nested, or in kohya's 10_name folders; captions in .txt, .caption or .json files beside
    them or in metadata.jsonl. --set section.key=value and --help-all reach every setting.
    """  # noqa: D301 (click wants the character itself, which keeps the lines below it as they are)
    if resume:
        if config_file:
            raise click.UsageError("--resume takes the settings of the run; leave --config out")
        from sdlora.training.folder import reopen

        run, config = reopen(resume, given(values), assignments)
    else:
        run, config = None, load_config(config_file, given(values), assignments)
    if processes and not started_here():
        if is_one_of_several():
            raise click.UsageError("the processes are started already (WORLD_SIZE is set); leave --processes out")
        if processes > 1:
            sys.exit(start(processes, this_command()))
    if started_here():
        stop_with_parent()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or pages of torch's bury our word on a lost process
    import_models()
    from sdlora.training.progress import terminal_reporter
    from sdlora.training.train import train
    from sdlora.training.world import World

    world = World.join()
    with world.one_voice():
        result = train(config, resume=run, reporter=terminal_reporter(), world=world)
        if world.is_first:
            click.echo(describe(result, config))
        world.leave()
    if result.interrupted:
        sys.exit(130)


command.params = [*setting_options(), *command.params]


def describe(result: Any, config: Config) -> str:
    """Says what a run left behind and what to do next; the prompt that it proposes is made as the captions were."""
    from sdlora.training.previews import as_trained
    from sdlora.training.progress import duration

    lines = []
    if not result.finished:
        lines.append(f"Stopped at step {result.steps} of {result.total_steps}; nothing is lost.")
        lines.append(f"Go on with: sdlora train --resume {shlex.quote(str(result.folder))}")
    if result.loss_start == result.loss_start:  # not NaN
        loss = f"Loss {result.loss_start:.4f} -> {result.loss_end:.4f} (first and last tenth of the steps)"
        lines.append(f"{loss} in {duration(result.seconds)}.")
    certificate = result.certificate
    lines.append(
        f"LoRA: {result.lora}  ({certificate.bytes / 1e6:.1f} MB, {certificate.num_keys} keys, read back and checked)"
    )
    overview = result.folder / "samples" / "overview.png"
    if result.finished and overview.exists():
        lines.append(f"Samples, without and with it: {overview}")
    if result.finished:
        prompt = as_trained("a castle", config)
        lines.append(f"Draw: sdlora sample --lora {shlex.quote(str(result.lora))} {shlex.quote(prompt)}")
    return "\n".join(lines)
