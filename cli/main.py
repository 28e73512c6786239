"""`mmkd`: finds the command, runs it, and turns this project's errors into one line."""

import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import click

from mmkd.base.errors import MmkdError

COMMANDS = {
    "demo": "Run the whole pipeline on real images from registry packages.",
    "doctor": "Report what this machine has and lacks.",
    "teachers": "List teachers, check that they load, compare them.",
    "extract": "Run teachers over a corpus into a store.",
    "store": "Inspect, check, copy and convert a store.",
    "select": "Choose which teachers to trust for which sample.",
    "align": "Map the teachers' spaces to one width.",
    "distill": "Train a student from a store.",
    "export": "Write a trained student as an open_clip folder.",
    "evaluate": "Score encoders by their features.",
}
"""Name (of module and function too) to summary. Not imports: `mmkd --help` must not load torch, dask or zarr."""

LONG = frozenset({"demo", "extract", "align", "distill", "evaluate", "export"})
"""Commands that continue when their output is closed."""

DISK_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""OS errors shown in one line, with the path, because they are not bugs."""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is called or asked for help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(importlib.import_module(f"mmkd.cli.{cmd_name}"), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="mmkd")
def cli() -> None:
    """Run CLIP teachers over a corpus once, memory-map their features, distill students, compare them honestly."""


class _Output:
    """Standard output of a command that continues after its reader exits (`| head -1`): further text is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._unless_closed(self._stream.write, text) or 0

    def flush(self) -> None:
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
        return
    except MmkdError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        # A stage whose extra is not installed; anything of ours that is missing is a bug and keeps its traceback.
        name = (error.name or "mmkd").split(".")[0]
        if name == "mmkd":
            raise
        from mmkd.cli.doctor import missing_package

        command = next((word for word in sys.argv[1:] if word in COMMANDS), "")
        message = f"this command needs the package {name!r}; run: {missing_package(name, command)}"
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    from mmkd.base.text import printable

    click.echo(f"Error: {printable(message)}", err=True)
    sys.exit(1)
