"""`mmkd store pull`, `subset`, `merge`, `append` and `relocate`: rows into another store, or into this one."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import CorruptStoreError, UserError
from mmkd.base.lock import only_writer
from mmkd.base.places.remote import StorePath, as_root
from mmkd.base.text import counted
from mmkd.cli.params import ALLOW_LOSS, ANY_PATH, JSON, STORE_PATH, TEACHERS, Names, echo, progress_bar
from mmkd.store import FeatureStore
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.rows import StoreRows, check_target, chosen_rows
from mmkd.store.fold import fold as pack
from mmkd.store.layout import ENCODINGS, Encoding
from mmkd.store.pull import pull as bring
from mmkd.store.pull import shard_range
from mmkd.store.record import Store
from mmkd.store.writer import move_corpus


def read_keys(path: Path) -> list[str]:
    """Read keys, one per line (LF or CRLF only: U+2028 may be part of a key), skipping a byte order mark and empty
    lines. Raises UserError if the file is not UTF-8, or holds no key."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"--keys {path}, line {line}: not UTF-8; save the file as UTF-8") from None
    keys = [key for line in lines if (key := line.removesuffix("\r"))]
    if not keys:
        raise UserError(f"--keys {path} holds no key; write one key per line")
    return keys


def _write_rows(
    parts: Sequence[tuple[FeatureStore, NDArray[np.int64]]],
    out: StorePath,
    teachers: Names,
    encoding: Encoding | None,
    allow_loss: tuple[str, ...],
) -> None:
    chosen = StoreRows(parts, teachers, allow_loss=allow_loss)
    with progress_bar("shard", hidden=False) as progress:
        report = import_features(chosen, out, encoding, progress)
    click.echo(f"{counted(report.rows, 'row')} in {out}; {counted(report.shards, 'shard')} written")


@click.command()
@click.argument("url", metavar="URL", type=as_root)
@click.argument("out", metavar="DIR", type=ANY_PATH)
@TEACHERS
@click.option("--shards", metavar="FIRST:END", help="Shards whose features to copy, END not included.  [default: all]")
@click.option("--workers", type=click.IntRange(1, 256), default=8, help="Files to copy at a time.")
@click.option("--inputs/--no-inputs", default=True, help="Also copy training inputs.")
@JSON
def pull(
    url: StorePath, out: Path, teachers: Names, shards: str | None, workers: int, inputs: bool, as_json: bool
) -> None:
    """Copy a store, or a part of it, to disk; each file is checked against the ledger. Run again to continue.

    All sample rows are copied, and selections of the copied teachers. Shards that are left out count as not
    extracted; pull again for them.

    \b
    mmkd store pull s3://bucket/features features/ --teachers biomedclip,plip --shards 0:10
    """
    source = FeatureStore.open(url)
    with progress_bar("file", hidden=as_json) as progress:
        some = shard_range(shards, source.shards) if shards else None
        report = bring(source, out, teachers=teachers, shards=some, inputs=inputs, workers=workers, progress=progress)
    copied = (
        f"{counted(report.shards, 'shard')} copied ({report.bytes / 2**20:,.1f} MB), {report.present} present before"
    )
    echo(as_json, asdict(report), [f"{counted(report.rows, 'row')} in {out}; {copied}"])


@click.command()
@STORE_PATH
@click.argument("out", type=as_root)
@click.option(
    "--keys", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="UTF-8 file with one key per line."
)
@click.option("--where", metavar="SQL", help='Rows that match a condition as in SQL: "width >= 224".')
@click.option("--selection", metavar="NAME", help="Rows for which this selection chooses any teacher.")
@TEACHERS
@click.option("--encoding", type=click.Choice(ENCODINGS), help="Encoding of the new store.  [default: unchanged]")
@ALLOW_LOSS
def subset(
    path: StorePath,
    out: StorePath,
    keys: Path | None,
    where: str | None,
    selection: str | None,
    teachers: Names,
    encoding: Encoding | None,
    allow_loss: tuple[str, ...],
) -> None:
    """Write a new store of some rows and teachers. Rows must satisfy all options. Run again to continue.

    \b
    mmkd store subset STORE ct/ --where "modality in ('CT', 'MRI') and caption is not null"
    """
    source = FeatureStore.open(path)
    check_target([source], out)
    rows = chosen_rows(source, read_keys(keys) if keys else None, where, selection)
    _write_rows([(source, rows)], out, teachers, encoding, allow_loss)


@click.command()
@STORE_PATH
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


@click.command()
@STORE_PATH
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--corpus", type=click.IntRange(min=0), default=0, help="Number of the corpus; appended corpora follow 0."
)
def relocate(path: StorePath, folder: Path, corpus: int) -> None:
    """Record in STORE that the images of a corpus are in FOLDER now. No feature or row changes."""
    moved = move_corpus(path, folder, corpus)
    click.echo(f"images of {moved.record.spans()[corpus].corpus.location} are looked for in {folder.resolve()}")


@click.command()
@STORE_PATH
@JSON
def fold(path: StorePath, as_json: bool) -> None:
    """Pack finished shards into few files, and fold their ledger entries. `mmkd extract` does this at its end.

    A run that was stopped leaves one file per shard and array; nothing else depends on it.
    """
    store = Store.open(path)
    with only_writer(path, "mmkd store fold"), progress_bar("pack", hidden=as_json) as progress:
        report = pack(store, progress)
    done = f"{counted(report.packs, 'pack')} written, {counted(report.entries, 'ledger entry')} folded"
    echo(as_json, asdict(report), (f"{path}: {done}", *(f"not packed: {damage}" for damage in report.damaged)))
    if report.damaged:
        raise CorruptStoreError(f"{path} has damaged chunks; run `mmkd store verify {path}`")


@click.command()
@click.argument("paths", metavar="STORE...", nargs=-1, required=True, type=as_root)
@click.argument("out", type=as_root)
@TEACHERS
@ALLOW_LOSS
def merge(paths: tuple[StorePath, ...], out: StorePath, teachers: Names, allow_loss: tuple[str, ...]) -> None:
    """Write a new store of the rows of several with equal teachers and distinct keys. Run again to continue."""
    stores = [FeatureStore.open(path) for path in paths]
    check_target(stores, out)
    _write_rows([(part, chosen_rows(part)) for part in stores], out, teachers, None, allow_loss)
