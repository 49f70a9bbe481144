"""Pages of help: plain text, in sections. Rich's cost more time than all else that `--help` does."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup


def _write(formatter: Any, rows: list[tuple[str, tuple[str, str]]]) -> None:
    """A section for each title, in the order in which they come first. rows: (title, (name, help))."""
    for title in dict.fromkeys(title for title, _ in rows):
        with formatter.section(title):
            formatter.write_dl([row for of, row in rows if of == title])


def _parameters(command: Any, ctx: Any) -> list[tuple[str, tuple[str, str]]]:
    """Arguments, the command's own options, those in panels, and --help."""
    by_title: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        row = parameter.get_help_record(ctx)
        if row is not None:
            title = "Arguments" if parameter.param_type_name == "argument" else "Options"
            by_title.setdefault(parameter.rich_help_panel or title, []).append(row)
    return [(title, row) for title, rows in by_title.items() for row in rows]


class Command(TyperCommand):
    """A command whose options stand in sections."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write(formatter, _parameters(self, ctx))


class Group(TyperGroup):
    """Commands in sections, with the first sentence of each."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        widest = max(map(len, self.commands))
        rows = []
        for name in self.list_commands(ctx):
            command = self.commands[name]
            row = name.ljust(widest), command.get_short_help_str(formatter.width - widest - 4)
            rows.append((getattr(command, "rich_help_panel", None) or "Commands", row))
        _write(formatter, [*rows, *_parameters(self, ctx)])
