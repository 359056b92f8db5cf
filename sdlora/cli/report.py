"""`sdlora report`: what somebody who is asked for help needs to see, in one zip, without what is nobody's business."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click

from sdlora.atomic import replacing
from sdlora.errors import ConfigError

LAST_LINES = 200
"""Of the log of steps."""
RUN_FILES = ("config.toml", "certificate.json", "heartbeat.json")
_TOKENS = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{8,}|(?<=://)[^/\s@]+(?=@)")
"""How access tokens begin, and the name and password in an address."""
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|KEY|CREDENTIAL", re.IGNORECASE)
_HIDDEN = "[hidden]"


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("sdlora-report.zip"), show_default=True)
def command(run: Path | None, output: Path) -> None:
    """Pack the environment, and a run's settings and log, into a zip to show to somebody.

    \b
    sdlora report
    sdlora report runs/style_dir-20260131-120000

    Pictures, captions, weights and checkpoints stay out of it. Access tokens are hidden and your home folder is
    shortened to ~; what is left can be read in the zip before it is sent. Nothing is sent by this command.
    """  # noqa: D301 (click wants the character itself, which keeps the lines below it as they are)
    if run and not (run / "config.toml").is_file():
        raise ConfigError(f"{run}: no run there (no config.toml); give the folder that `sdlora train` printed")
    if output.exists():
        raise ConfigError(f"{output} exists; give another name with --output")
    with replacing(output) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, text in _contents(run):
            packed.writestr(name, redacted(text))
    with zipfile.ZipFile(output) as packed:
        click.echo(f"{output}: {', '.join(packed.namelist())}")


def _contents(run: Path | None) -> Iterator[tuple[str, str]]:
    from sdlora.training.survey import survey

    yield "environment.json", json.dumps(survey(), indent=2)
    if run is None:
        return
    for name in RUN_FILES:
        if (file := run / name).is_file():
            yield name, file.read_text(encoding="utf-8", errors="replace")
    if (log := run / "metrics.jsonl").is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        yield log.name, "\n".join(lines[-LAST_LINES:]) + "\n"


def redacted(text: str) -> str:
    """Hides access tokens, whatever secret the environment holds, and where the user's home is."""
    secrets = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name) and len(value) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(json.dumps(home)[1:-1], "~").replace(home, "~")
    return _TOKENS.sub(_HIDDEN, text)
