"""`mmkd store subset`, `merge`, `append` and `relocate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.base.errors import UserError
from mmkd.base.text import counted
from mmkd.cli.params import ENCODINGS, STORE
from mmkd.cli.store.group import store

if TYPE_CHECKING:
    from mmkd.base.places.remote import StorePath
    from mmkd.store import FeatureStore
    from mmkd.store.encoding import Encoding


def read_keys(path: Path) -> list[str]:
    """Read keys from a UTF-8 file, one per line, skipping a byte order mark and empty lines. Lines end in LF or CRLF
    only: U+2028 and other separators may be part of a key. Raises UserError if the file is not UTF-8, or holds no
    key."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"--keys {path}, line {line}: not UTF-8; save the file as UTF-8") from None
    keys = [key for line in lines if (key := line.removesuffix("\r"))]
    if not keys:
        raise UserError(f"--keys {path} holds no key; write one key per line")
    return keys


def _name_what_stays(stores: Sequence[FeatureStore]) -> None:
    """Name selections and training inputs, which belong to the rows of their store and are not taken along."""
    from mmkd.store.inputs import read_inputs_ledger
    from mmkd.store.selections import selection_names

    for source in stores:
        names, shards = selection_names(source.root), len(read_inputs_ledger(source.root))
        parts = [f"selections {', '.join(names)}"] * bool(names)
        parts += [f"the training inputs of {counted(shards, 'shard')}"] * bool(shards)
        if parts:
            click.echo(f"not taken along from {source.root}: {' and '.join(parts)}", err=True)


def _silent(done: int, every: int) -> None:
    """No progress bar."""


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.argument("out", type=STORE)
@click.option(
    "--keys", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="UTF-8 file with one key per line."
)
@click.option("--where", metavar="SQL", help='Rows that match a condition as in SQL: "width >= 224".')
@click.option("--selection", metavar="NAME", help="Rows for which this selection chooses any teacher.")
@click.option("--teachers", help="Teachers to keep, separated by commas.  [default: all]")
@click.option("--encoding", type=click.Choice(ENCODINGS), help="Encoding of the new store.  [default: unchanged]")
@click.option(
    "--incomplete", is_flag=True, help="Also take rows that a teacher has not extracted; their features are missing."
)
def subset(
    path: StorePath,
    out: StorePath,
    keys: Path | None,
    where: str | None,
    selection: str | None,
    teachers: str | None,
    encoding: Encoding | None,
    incomplete: bool,
) -> None:
    """Write a new store of some rows and teachers. Rows must satisfy all options. Run again to continue.

    \b
    mmkd store subset STORE ct/ --where "modality in ('CT', 'MRI') and caption is not null"
    """
    from mmkd.store import FeatureStore
    from mmkd.store.convert.importing import import_features
    from mmkd.store.convert.rows import StoreRows, check_target, chosen_rows

    source = FeatureStore.open(path)
    check_target([source], out)
    rows = chosen_rows(source, read_keys(keys) if keys else None, where, selection)
    names = teachers.split(",") if teachers else None
    report = import_features(StoreRows([(source, rows)], names, incomplete=incomplete), out, encoding, _silent)
    click.echo(f"{counted(report.rows, 'row')} in {out}; {counted(report.shards, 'shard')} written")
    _name_what_stays([source])


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.argument("corpus")
def append(path: StorePath, corpus: str) -> None:
    """Add the rows of another CORPUS to STORE; `mmkd extract CORPUS STORE` then extracts them.

    Features in the store are not rewritten. The new rows begin at the next shard boundary.
    """
    from mmkd.extract.corpora import open_corpus
    from mmkd.extract.index import append_corpus

    span = append_corpus(open_corpus(corpus), path, say=click.echo)
    click.echo(
        f"{span.corpus.rows:,} rows of {span.corpus.location} are rows {span.rows.start:,} to {span.rows.stop - 1:,} "
        f"of {path}; next: mmkd extract {corpus} {path} --teachers ..."
    )


@store.command()
@click.argument("path", metavar="STORE", type=STORE)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--corpus",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Number of the corpus; appended corpora follow 0.",
)
def relocate(path: StorePath, folder: Path, corpus: int) -> None:
    """Record in STORE that the images of a corpus are in FOLDER now. No feature or row changes."""
    from mmkd.store.writer import move_corpus

    moved = move_corpus(path, folder, corpus)
    click.echo(f"images of {moved.record.spans()[corpus].corpus.location} are looked for in {folder.resolve()}")


@store.command()
@click.argument("paths", metavar="STORE...", nargs=-1, required=True, type=STORE)
@click.argument("out", type=STORE)
@click.option("--teachers", help="Teachers to keep, separated by commas.  [default: all; every STORE must have them]")
@click.option(
    "--incomplete", is_flag=True, help="Also take rows that a teacher has not extracted; their features are missing."
)
def merge(paths: tuple[StorePath, ...], out: StorePath, teachers: str | None, incomplete: bool) -> None:
    """Write a new store of the rows of several with equal teachers and distinct keys. Run again to continue."""
    from mmkd.store import FeatureStore
    from mmkd.store.convert.importing import import_features
    from mmkd.store.convert.rows import StoreRows, check_target, chosen_rows

    stores = [FeatureStore.open(path) for path in paths]
    check_target(stores, out)
    names = teachers.split(",") if teachers else None
    parts = [(part, chosen_rows(part)) for part in stores]
    source = StoreRows(parts, names, incomplete=incomplete)
    report = import_features(source, out, None, _silent)
    click.echo(f"{counted(report.rows, 'row')} in {out}; {counted(report.shards, 'shard')} written")
    _name_what_stays(stores)
