"""Commands that lie in a file each, imported only when they are called: `--help` of the group answers at once."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """Lists its commands from a table, without importing torch.

    Args:
        *args: click's.
        table: by command: the file in this room that holds it as `command`, and one line of help.
        **kwargs: click's.
    """

    def __init__(self, *args: Any, table: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the commands in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Imports a command."""
        if cmd_name not in self.table:
            near = difflib.get_close_matches(cmd_name, self.table, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(self.table)}"
            raise click.UsageError(f"no command {cmd_name!r}; {hint}")
        return importlib.import_module(f"sdlora.cli.{self.table[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table instead of what click would read from every command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self.table.items()])
