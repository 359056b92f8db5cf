"""The settings of `sdlora.config` as command line options: the common ones shown, all of them accepted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click

from sdlora.config import Config, Setting, Switch, all_settings


def setting_options() -> list[click.Option]:
    """Returns an option for every setting, the pictures first.

    Values stay text here; `load_config` checks them all at once.
    """
    return sorted((_option(s) for s in all_settings()), key=lambda option: option.name != "images")


def _option(s: Setting) -> click.Option:
    help_text = f"{s.field.description}{_default(s)}"
    if s.field.annotation is bool:
        flags = [s.key, f"{s.flag}/--no-{s.flag.removeprefix('--')}"]
        return click.Option(flags, default=None, help=help_text, hidden=not s.common)
    alone: Any = {"is_flag": False, "flag_value": "true"} if Switch in s.field.metadata else {}
    return click.Option([s.key, s.flag], help=help_text, hidden=not s.common, metavar=_metavar(s), **alone)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that the user gave, by `section.key`."""
    return {s.path: values[s.key] for s in all_settings() if values.get(s.key) is not None}


def all_help() -> str:
    """Lists every setting with its flag, default and help, section by section."""
    lines = [
        "Every setting, as a flag, as `--set section.key=value`, or in a TOML file (`sdlora defaults` prints one).",
        "Later ones win: defaults, --config file, flags, --set.",
    ]
    formatter = click.HelpFormatter(width=110)
    for section, field in Config.model_fields.items():
        annotation: Any = field.annotation
        formatter.write_paragraph()
        formatter.write_text(f"[{section}]  {annotation.__doc__.strip().splitlines()[0]}")
        with formatter.indentation():
            rows = [
                (f"{s.flag} {_metavar(s)}".strip(), f"{s.field.description}{_default(s)}")
                for s in all_settings()
                if s.section == section
            ]
            formatter.write_dl(rows, col_max=38)
    return "\n".join(lines) + "\n" + formatter.getvalue()


def _metavar(s: Setting) -> str:
    if s.field.annotation is bool:
        return ""
    choices = [a for a in get_args(s.field.annotation) if isinstance(a, str)]
    if choices:
        return "|".join(choices)
    kinds = {str(s.field.annotation), *(getattr(a, "__name__", "") for a in get_args(s.field.annotation))}
    kinds.add(getattr(s.field.annotation, "__name__", ""))
    for kind, word in (("Path", "PATH"), ("int", "N"), ("float", "X")):
        if kind in kinds:
            return word
    return "TEXT"


def _default(s: Setting) -> str:
    default = s.field.default
    if default is None or default == "" or isinstance(default, Path):
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" [{default}]"
