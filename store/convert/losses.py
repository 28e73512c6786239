"""What a conversion would lose: named in one line, and asked for before anything is written."""

from collections.abc import Collection, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import UserError
from mmkd.base.text import counted
from mmkd.store.inputs import read_inputs_ledger
from mmkd.store.reader import FeatureStore
from mmkd.store.selections import selection_names
from mmkd.store.writer import iter_shards

KINDS = ("cards", "columns", "extraction", "inputs", "keys", "rows", "selections")
"""cards: what is known of a teacher beside its name. columns: values that the target has no place for. extraction: that
a teacher has still to extract some rows; their features count as missing. inputs: stored training inputs. keys: keys
that change. rows: rows that are left out. selections: all of them."""

Loss = tuple[str, str]
"""A kind, and what exactly would be lost."""


def refuse_losses(target: object, losses: Iterable[Loss], allowed: Collection[str]) -> None:
    """Raise UserError that names all `losses` whose kind is not `allowed`; `all` stands for every kind."""
    found = [loss for loss in losses if not {loss[0], "all"} & set(allowed)]
    if found:
        kinds = ",".join(dict.fromkeys(kind for kind, _ in found))
        raise UserError(
            f"{target} would be without {'; without '.join(what for _, what in found)}; nothing was written: add "
            f"--allow-loss {kinds} to accept this"
        )


def refuse_linked(target: object, store: FeatureStore, rows: NDArray[np.int64]) -> None:
    """Raise UserError if one of these rows is a view or a further caption: in `target` the rows that it names would
    have other numbers, or the picture that it is made of would take its place."""
    for begin, end in ((span.rows.start, span.rows.stop) for span in store.record.spans() if span.corpus.is_linked):
        if len(linked := rows[(rows >= begin) & (rows < end)]):
            raise UserError(
                f"row {linked[0]} of {store.root} is a view or a caption of other rows, which {target} has no place "
                f'for; `mmkd store subset {store.root} NEW --where "image_rows is null"` leaves such rows out'
            )


def every_row(store: FeatureStore) -> NDArray[np.int64]:
    """Return the rows that are no gap between corpora, int64 (n,)."""
    return np.concatenate([np.arange(span.start, span.stop) for span in iter_shards(store.record)])


def store_losses(store: FeatureStore, rows: NDArray[np.int64], slugs: Collection[str]) -> Iterator[Loss]:
    """Yield what no target takes along of these rows and teachers: selections and training inputs belong to the rows of
    the store, and a row that a teacher has still to extract has no feature."""
    if names := selection_names(store.root):
        yield "selections", f"the selections {', '.join(names)} of {store.root}"
    if shards := len(read_inputs_ledger(store.root)):
        yield "inputs", f"the training inputs of {counted(shards, 'shard')} of {store.root}"
    shards_of = rows // store.record.rows_per_shard
    for slug in slugs:
        asked = np.intersect1d(shards_of, store.record.asked_shards(store.card(slug))).tolist()
        if lacking := [shard for shard in asked if (shard, slug) not in store.ledger]:
            some = f"{np.isin(shards_of, lacking).sum():,} of {len(rows):,} rows of {store.root}"
            first = f"shard {lacking[0]} is the first; `mmkd extract` finishes them"
            yield "extraction", f"features of {slug} for {some} ({first})"
