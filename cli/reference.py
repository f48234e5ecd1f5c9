"""The page ``docs/cli.md``, made from the commands themselves: ``python -m cli.reference`` prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import cleandoc
from typing import Any

import typer

from .main import COMMANDS, help_text

_HEAD = """\
# The command line

<!-- Made by `make docs` from the commands' own help; a test compares the two. -->

Text goes to standard output, everything else to standard error. `--json` prints one object with a `schema` field.
Options beat `AXON_*` variables, which beat defaults. `NO_COLOR` is honoured. `AXON_DEBUG=1` shows where an unexpected
error came from.

| Exit code | Meaning |
|---:|---|
| 0 | done |
| 1 | failed, or the comparison found a difference |
| 2 | an option, argument or request that makes no sense |
| 3 | model not found or unreadable |
| 4 | broker or Redis unreachable |
| 130 | Ctrl-C |
"""


def page() -> str:
    """The page as Markdown."""
    parts = [_HEAD, f"```\n{help_text()}\n```\n"]
    for name, (module, _) in COMMANDS.items():
        command = import_module(f".{module}", __package__).command
        if not isinstance(command, typer.Typer):
            app = typer.Typer(add_completion=False, rich_markup_mode=None)
            app.command(name)(command)
            command = app
        parts.extend(_sections(f"axon {name}", typer.main.get_command(command), level=2))
    return "\n".join(parts)


def _sections(title: str, command: Any, level: int) -> Iterator[str]:
    lines = [f"{'#' * level} {title}", "", cleandoc(command.help or ""), ""]
    inner = getattr(command, "commands", {})
    rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
    if rows and not inner:
        lines += ["| Option or argument | Meaning | Default |", "|---|---|---|", *rows, ""]
    yield "\n".join(lines)
    for name, child in inner.items():
        yield from _sections(f"{title} {name}", child, level + 1)


def _row(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        names = f"`{parameter.name.upper()}`"
    else:
        names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    meaning = (parameter.help or "").replace("|", "\\|")
    if parameter.envvar and parameter.envvar not in meaning:
        meaning += f" `{parameter.envvar}`"
    default = parameter.default
    if default is None or default == "" or default is False:
        shown = "required" if parameter.required else ""
    else:
        shown = f"`{parameter.opts[0] if default is True else default}`"
    return f"| {names} | {meaning.strip()} | {shown} |"


if __name__ == "__main__":
    sys.stdout.write(page())
