"""Parameters that several commands share, and their progress bar."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import click
from tqdm import tqdm

from mmkd.base.errors import ConfigError
from mmkd.base.places.remote import as_root
from mmkd.base.text import printable

Names = tuple[str, ...] | None
"""Value of `TEACHERS`."""


def names(text: str) -> tuple[str, ...]:
    """Return comma-separated names."""
    return tuple(text.split(","))


def _sample_size(text: str) -> int | None:
    """Return a number of rows, None for `all`. Raises ConfigError for anything else."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"--sample {text!r} is neither a number of rows from 1 nor `all`")
    return int(text)


def _loss_kinds(text: str) -> tuple[str, ...]:
    """Return comma-separated kinds of loss. Raises ConfigError for an unknown one."""
    from mmkd.store.convert.losses import KINDS

    kinds = names(text) if text else ()
    if unknown := [kind for kind in kinds if kind not in (*KINDS, "all")]:
        raise ConfigError(f"--allow-loss {unknown[0]!r} is none of {', '.join(KINDS)}, nor `all`")
    return kinds


ANY_PATH = click.Path(path_type=Path)
FILE_PATH = click.Path(path_type=Path, dir_okay=False)
FOLDER_PATH = click.Path(path_type=Path, file_okay=False)
STORE_PATH = click.argument("path", metavar="STORE", type=as_root)
JSON = click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
TEACHERS = click.option("--teachers", type=names, metavar="NAMES", help="Comma-separated names.  [default: all]")
ALLOW_LOSS = click.option(
    "--allow-loss", type=_loss_kinds, default="", metavar="KINDS|all", show_default=False,
    help="What may be lost, as the refusal names it.",
)  # fmt: skip
SAMPLE = partial(click.option, "--sample", type=_sample_size, metavar="ROWS|all", help="Rows to draw.")
"""The option `--sample`, with its `default`."""
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, help="Random seed for sampling.")


def echo(as_json: bool, content: object, lines: Iterable[str]) -> None:
    """Print `content` as JSON, or else lines without control characters: text from a store cannot move the cursor,
    change colors or add lines."""
    click.echo(json.dumps(content, indent=1) if as_json else "\n".join(map(printable, lines)))


@contextmanager
def progress_bar(unit: str, hidden: bool) -> Iterator[Callable[[int, int], None]]:
    """Give a function of what is done and how much there is; it draws on a terminal only."""
    with tqdm(unit=unit, disable=True if hidden else None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
