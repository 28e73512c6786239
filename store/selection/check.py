"""Are the selections of a store what was written, and do they still fit its rows and teachers?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mmkd.store.card import TeacherCard
from mmkd.store.errors import CorruptStoreError, FormatVersionError, UserError
from mmkd.store.hierarchy import array_document, document_fault, read_json
from mmkd.store.record import StoreRecord
from mmkd.store.remote import StorePath
from mmkd.store.selection.array import FOLDER, Selection, read_selection, selection_names


def selection_faults(
    root: StorePath, record: StoreRecord, cards: Mapping[str, TeacherCard]
) -> Iterator[tuple[str, str]]:
    """File and what is wrong with it, for every selection that training would refuse or should not trust.

    Reads every byte of every selection. Nothing here can be mended without judging the pairs again, so the next step
    is always the same: delete the folder, run `mmkd select`.

    Args:
        root: the store.
        record: of the store.
        cards: sound cards by slug; a selection may be of fewer teachers, not of others.
    """
    for name in selection_names(root):
        file = f"{FOLDER}/{name}/zarr.json"
        try:
            selection = read_selection(root, record, name)
        except (CorruptStoreError, FormatVersionError, UserError) as error:
            yield file, f"{error}; delete {FOLDER}/{name} first"
            continue
        shape = (record.rows, len(selection.card.teachers))
        expected = array_document(shape, (record.rows_per_shard, shape[1]), "uint8")
        wrong = document_fault(read_json(root / file), expected)
        if wrong:
            yield file, f"{file} is not the metadata that its card asks for ({wrong}); delete {FOLDER}/{name} first"
        for what in _faults(selection, cards):
            yield file, f"selection {name!r} {what}; delete {FOLDER}/{name} and run `mmkd select` again"


def _faults(selection: Selection, cards: Mapping[str, TeacherCard]) -> Iterator[str]:
    card = selection.card
    for column, (slug, digest) in enumerate(card.teachers.items()):
        if slug not in cards:
            yield f"judged teacher {slug}, which has no sound card in this store"
        elif cards[slug].digest != digest:
            yield f"judged teacher {slug} of digest {digest}, the store's has {cards[slug].digest}"
        kept, counted = int(selection.kept[:, column].sum()), _counted(card.counts, slug)
        if kept != counted:
            yield f"keeps {kept:,} pairs of teacher {slug}, its counts say {counted}"


def _counted(counts: object, slug: str) -> object:
    """Pairs kept of a teacher as the card has it; whoever can seal a card can put anything there."""
    for name in ("teachers", slug, "kept"):
        counts = counts.get(name) if isinstance(counts, dict) else None
    return counts
