"""Write docs/commands.md from the commands' own help, so that the reference cannot lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from mmkd.cli.main import cli

HEADER = """# Commands

Made from the commands' own help by `make docs`; a test compares the two. Every error that you can mend is one line
and ends with exit status 1; wrong usage ends with 2.
"""


def sections(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """One section for each command below `command`, with the help that a user gets."""
    context = click.Context(
        command, parent, info_name=name, terminal_width=110, max_content_width=110, **command.context_settings
    )
    yield f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from sections(found, child, context)


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *sections(cli, "mmkd")])


if __name__ == "__main__":
    (Path(__file__).parent / "commands.md").write_text(reference(), encoding="utf-8")
