"""`mmkd store subset` and `mmkd store merge`: new stores of rows that are there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.cli.store.group import store
from mmkd.cli.store_place import ENCODINGS, STORE
from mmkd.store.errors import ConfigError

if TYPE_CHECKING:
    from mmkd.store.encoding import Encoding
    from mmkd.store.remote import StorePath


def _silent(done: int, every: int) -> None:
    """A gather needs no bar."""


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.argument("out", type=STORE)
@click.option("--keys", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="File with one key a line.")
@click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Rows whose column has this value; may repeat.")
@click.option("--teachers", help="Names to keep, with commas between; all when not given.")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="Of the new store.  [default: as it is]")
def subset(
    path: StorePath,
    out: StorePath,
    keys: Path | None,
    where: tuple[str, ...],
    teachers: str | None,
    encoding: Encoding | None,
) -> None:
    """Write a new store of some rows and teachers. Run again to go on."""
    from mmkd.store import FeatureStore
    from mmkd.store.convert.importing import import_features
    from mmkd.store.convert.rows import StoreRows, chosen_rows

    wrong = [condition for condition in where if "=" not in condition]
    if wrong:
        raise ConfigError(f"--where {wrong[0]!r} is not COLUMN=VALUE, for example --where status=ok")
    source = FeatureStore.open(path)
    conditions = [(column, value) for column, _, value in (condition.partition("=") for condition in where)]
    rows = chosen_rows(source, keys.read_text("utf-8").splitlines() if keys else None, conditions)
    names = teachers.split(",") if teachers else None
    report = import_features(StoreRows([(source, rows)], names), out, encoding, _silent)
    click.echo(f"{report.rows:,} rows in {out}; {report.shards} shards written")


@store.command()
@click.argument("paths", metavar="STORE...", nargs=-1, required=True, type=STORE)
@click.argument("out", type=STORE)
def merge(paths: tuple[StorePath, ...], out: StorePath) -> None:
    """Write a new store of the rows of several with the same teachers and distinct keys. Run again to go on."""
    import numpy as np

    from mmkd.store import FeatureStore
    from mmkd.store.convert.importing import import_features
    from mmkd.store.convert.rows import StoreRows

    stores = [FeatureStore.open(path) for path in paths]
    source = StoreRows([(part, np.arange(len(part))) for part in stores])
    report = import_features(source, out, None, _silent)
    click.echo(f"{report.rows:,} rows in {out}; {report.shards} shards written")
