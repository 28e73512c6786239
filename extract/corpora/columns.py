"""Roles of a table's columns: by the user's names, else by the names that released corpora use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError
from mmkd.extract.corpora.row import Ignored
from mmkd.store.samples import FIXED_COLUMNS

# Names that released biomedical corpora use, in the order in which they are tried.
_USUAL = {
    "image": (
        "image",
        "filepath",
        "image_path",
        "imgpath",
        "path",
        "file",
        "filename",
        "file_name",
        "img",
        "jpg",
        "png",
        "images",
    ),
    "caption": ("caption", "text", "txt", "title", "captions"),
    "key": ("key", "id", "uid", "sample_id"),
    "modality": ("modality",),
}
_MAX_LABELS = 256


class TableColumns(Frozen):
    """Columns by role. A column that is not named is looked for under its usual names, in any case."""

    image: str | None = None
    caption: str | None = None
    key: str | None = None
    modality: str | None = None


def roles(columns: TableColumns, header: Sequence[str], where: object, made: bool = False) -> dict[str, str]:
    """Role to column name; `made` says that a template makes image or caption.

    Raises:
        CorpusError: a named column is not there, or there is neither image nor caption.
    """
    found: dict[str, str] = {}
    folded = {name.strip().casefold(): name for name in reversed(header)}
    for role, usual in _USUAL.items():
        named = getattr(columns, role)
        if named is not None and named not in header:
            raise CorpusError(f"{where} has no column {named!r} (for the {role}); it has {_some(header)}")
        candidates = (name if name in header else folded.get(name) for name in usual)
        name = named or next((name for name in candidates if name is not None and name not in found.values()), None)
        if name is not None:
            found[role] = name
    if not made and not {"image", "caption"} & set(found):
        raise CorpusError(
            f"{where} has no column for the image or the caption; it has {_some(header)}; "
            "name them in a corpus.yaml: {kind: ..., path: ..., columns: {image: ..., caption: ...}}"
        )
    return found


def label_names(
    wanted: tuple[str, ...] | None, found: Mapping[str, str], header: Sequence[str], where: object
) -> tuple[str, ...]:
    """Columns that pass into the sample table: those wanted, else all that have no role.

    Raises:
        CorpusError: one is missing, has the name of a column of the sample table, or there are too many.
    """
    if wanted is None:
        wanted = tuple(name for name in header if name not in found.values())
        if len(wanted) > _MAX_LABELS:
            raise CorpusError(
                f"{where} has {len(wanted)} columns; name some of them as `label_columns` in a corpus.yaml"
            )
    for label in wanted:
        if label not in header:
            raise CorpusError(f"{where} has no label column {label!r}; it has {_some(header)}")
        if label in FIXED_COLUMNS.names:
            raise CorpusError(
                f"{where}: label column {label!r} has the name of a column of the sample table; "
                f"rename it, or list the others as `label_columns` (taken: {', '.join(FIXED_COLUMNS.names)})"
            )
    return wanted


def ignored_columns(header: Sequence[str], used: Iterable[str], why: str) -> Iterator[Ignored]:
    """Columns that are neither a role nor a label."""
    taken = set(used)
    yield from (Ignored(f"column: {why}", name[:60]) for name in header if name not in taken)


def _some(header: Sequence[str]) -> str:
    return ", ".join(name[:60] for name in header[:20]) + (", ..." if len(header) > 20 else "")
