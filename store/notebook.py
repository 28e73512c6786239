"""A store as a notebook shows it: one table, readable by eye, by screen reader and without style sheets."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from mmkd.store.layout import TOWERS
from mmkd.store.plural import counted

if TYPE_CHECKING:
    from mmkd.store.reader import FeatureStore

_COLUMNS = ("teacher", "width", "encoding", "shards", "images", "captions", "source", "licence")


def store_table(store: FeatureStore) -> str:
    """HTML of a store: where, how many rows, and a row for each teacher. Reads the ledger, no features and no samples.

    Every text that came from a file is escaped: a store from elsewhere may hold anything.
    """
    rows, shards = counted(len(store), "row"), counted(store.shards, "shard")
    title = f"mmkd store {store.root}: {rows} in {shards} of {store.record.rows_per_shard:,}"
    head = "".join(f'<th scope="col">{name}</th>' for name in _COLUMNS)
    body = "".join(_teacher_row(store, slug) for slug in store.teachers)
    empty = f'<tr><td colspan="{len(_COLUMNS)}">no teachers yet</td></tr>'
    return (
        f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body or empty}</tbody></table>"
    )


def _teacher_row(store: FeatureStore, slug: str) -> str:
    card = store.teachers[slug]
    entries = [entry for (_, teacher), entry in store.ledger.items() if teacher == slug]
    sound = (f"{sum(getattr(entry, f'{tower}_rows') for entry in entries):,}" for tower in TOWERS)
    done = f"{len(entries)} of {store.shards}"
    cells = (str(card.dim), card.encoding, done, *sound, card.source, card.licence)
    return f'<tr><th scope="row">{escape(slug)}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
