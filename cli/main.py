"""`mmkd`: finds the command, runs it, and turns this project's errors into one line."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import click

from mmkd.base.errors import MmkdError

# Name to module and attribute. A table and not an import: `mmkd --help` must not load torch, dask or zarr.
COMMANDS = {
    "demo": ("mmkd.cli.demo", "demo"),
    "doctor": ("mmkd.cli.doctor", "doctor"),
    "teachers": ("mmkd.cli.teachers", "teachers"),
    "extract": ("mmkd.cli.extract", "extract"),
    "store": ("mmkd.cli.store", "store"),
    "select": ("mmkd.cli.select", "select"),
    "align": ("mmkd.cli.align", "align"),
    "distill": ("mmkd.cli.distill", "distill"),
    "export": ("mmkd.cli.export", "export"),
    "evaluate": ("mmkd.cli.evaluate", "evaluate"),
}

SUMMARIES = {
    "demo": "The whole path on real images from registry packages.",
    "doctor": "What this machine has and lacks.",
    "teachers": "The teachers: who they are, whether they load.",
    "extract": "Run teachers over a corpus into a store.",
    "store": "Look at a store, check it, bring features in and out.",
    "select": "Choose which teacher to believe for which sample.",
    "align": "Bring the teachers' spaces to one width.",
    "distill": "Train a student from a store.",
    "export": "A trained student as an open_clip folder.",
    "evaluate": "Score encoders by their features.",
}

LONG = frozenset({"demo", "extract", "align", "distill", "evaluate", "export"})
"""Commands that go on when their output is closed."""

DISK_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""OS errors shown in one line, with the path, because they are not bugs."""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return names in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, SUMMARIES[name]) for name in COMMANDS])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="mmkd")
def cli() -> None:
    """Run CLIP teachers over a corpus once, keep their features memory-mapped, distil students, compare honestly."""


class _Output:
    """Standard output of a command that goes on after its reader exits (`| head -1`)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write; discard if the reader is gone."""
        return self._unless_closed(self._stream.write, text) or 0

    def flush(self) -> None:
        """Flush; discard if the reader is gone."""
        self._unless_closed(self._stream.flush)

    def _unless_closed(self, act: Callable[..., int | None], *arguments: str) -> int | None:
        try:
            return act(*arguments)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return None


def main() -> None:
    """Console entry point. Exit status 1 for an error the user can fix, 2 for wrong usage. click ends commands silently
    when their output is closed."""
    if sys.stdout is None:  # `>&-`: nothing else may get its number
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if LONG & set(sys.argv[1:2]):
        sys.stdout = cast(TextIO, _Output(sys.stdout))
    try:
        cli()
    except MmkdError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        # A stage whose extra is not installed; anything of ours that is missing is a bug and keeps its traceback.
        name = (error.name or "mmkd").split(".")[0]
        if name == "mmkd":
            raise
        # Imported here because only a failure needs it.
        from mmkd.cli.doctor import missing_package

        command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
        click.echo(f"Error: this command needs the package {name!r}; run: {missing_package(name, command)}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {place}{error.strerror}", err=True)
        sys.exit(1)
