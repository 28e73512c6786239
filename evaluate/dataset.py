"""The rows of one data set: which grid rows its splits are, and their labels, groups and captions."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmkd.base.arrays import Bools, Ints, Objects
from mmkd.base.errors import UserError, collect
from mmkd.base.text import cell_text
from mmkd.evaluate.dataset_spec import OTHERS, DatasetSpec, RowFilter
from mmkd.store import FeatureStore

Split = Literal["test", "train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT = "split of the suite"
"""Column of joined samples; the blanks keep it apart from a label column."""
FIXED = ("row", "key", "caption", "uri", "image_sha256", "status")


def value_name(value: object) -> str:
    """`blank` for None, else the value in quotes."""
    return "blank" if value is None else repr(value)


def value_counts(values: Iterable[object], most: int = 8) -> str:
    """Return values (or a counter of them) with their counts, most frequent first: `'dead' 8, blank 3, and 2 more`."""
    counts = Counter(values).most_common()
    shown = [f"{value_name(value)} {count}" for value, count in counts[:most]]
    return ", ".join(shown + ([f"and {len(counts) - most} more"] if len(counts) > most else []))


@dataclass(frozen=True)
class Samples:
    """Rows of one split, in grid order. Cells are as `mmkd.base.text.cell_text` has them."""

    name: str
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def rows(self) -> Ints:
        """Grid rows of the store, int64 (n,), ascending."""
        return np.asarray(self.table["row"].to_numpy(), dtype=np.int64)

    @cached_property
    def ids(self) -> Objects:
        """Sample keys, str (n,)."""
        return self.column("key")

    def column(self, name: str) -> Objects:
        """Return one column (n,): str, or None where the table has null."""
        values = self.table[name].to_pylist()
        return np.array([value if value is None else str(value) for value in values], dtype=object)

    def filled(self, name: str, other: Objects | str) -> Objects:
        """Return one column, str (n,), with `other` in place of nulls."""
        values = self.column(name)
        return np.where(values == None, other, values)  # noqa: E711 - element by element

    def positions(self, name: str) -> dict[str, list[int]]:
        """Return the rows of each value of a column, null being `None`, as positions in the order of the rows."""
        found: dict[str, list[int]] = {}
        for i, value in enumerate(self.column(name)):
            found.setdefault(str(value), []).append(i)
        return found

    def units(self, name: str | None) -> Objects:
        """One name for all rows with the same value of a column, str (n,). A row without one, or every row without a
        column, is a unit of its own; a blank before its key keeps it apart from values."""
        return self.ids if name is None else self.filled(name, " " + self.ids)

    def two_way(self, yes: RowFilter, no: RowFilter | None, option: str) -> Bools:
        """Rows whose columns all have one of the values of `yes`, bool (n,). Other values must be among those of `no`,
        `*` for all but null; without `no` a column may have one other value, and no null. Raises UserError for
        values on neither side, with their counts. `option`: name of `no` in the description."""
        found, sides = np.ones(len(self), dtype=bool), no or {}
        for name, values in yes.items():
            cells, listed = self.column(name), sides.get(name, ())
            matches = np.array([(cell or "") in values for cell in cells], dtype=bool)
            found &= matches
            other = cells[~matches].tolist()
            if name not in sides and len(set(other)) == 1 and other[0] is not None:
                continue
            alien = [cell for cell in other if (cell or "") not in listed and (cell is None or OTHERS not in listed)]
            if alien:
                raise UserError(
                    f"{name} has {value_counts(alien)} among the {self.name} rows beside "
                    f"{' and '.join(map(repr, values))}; name the values that mean otherwise under "
                    f"`{option}: {{{name}: [...]}}`, or leave these rows out with `rows`"
                )
        return found


@dataclass(frozen=True)
class DatasetRows:
    """A data set with its splits found in the store. texts: by name rows that the description asks for beside them:
    `prompt`, `negative prompt` (of the absence of classes), and those of its sections. classes: names by class index;
    empty without a label column. values: by column that a filter reads, counts of all values in the store."""

    spec: DatasetSpec
    store: FeatureStore
    splits: dict[str, Samples]
    texts: Mapping[str, Samples]
    classes: tuple[str, ...]
    values: Mapping[str, Counter[object]]

    def split(self, name: Split) -> Samples:
        """Return the rows of one split. Raises UserError if the suite does not define it, or it has no rows."""
        samples = self.splits.get(name)
        if samples is None or len(samples) == 0:
            filters = getattr(self.spec.rows, name) or {}
            asked = ", ".join(f"{column}: {' or '.join(map(str, values))}" for column, values in filters.items())
            raise UserError(f"{self.spec.dataset} has no {name} rows: {{{asked}}} matches nothing in {self.store.root}")
        return samples

    def joined(self, names: tuple[Split, ...]) -> Samples:
        """Return the rows of several splits as one, with a column `split` of their origin."""
        tables = [
            self.split(name).table.append_column(SPLIT, pa.array([name] * len(self.split(name)))) for name in names
        ]
        return Samples("+".join(names), pa.concat_tables(tables))

    @property
    def class_of(self) -> dict[str | None, int]:
        """Value of the label column, None for a blank one, to class index."""
        values = self.spec.classes or {name: (name,) for name in self.classes}
        return {value or None: i for i, name in enumerate(self.classes) for value in values[name]}

    def labels(self, samples: Samples) -> Ints:
        """Class index of every row, int64 (n,). Raises UserError for a label that is not among the classes."""
        return self._class_index(samples, self.label_column, self.class_of)

    def prompt_labels(self, negative: bool = False) -> Ints:
        """Class index of every (negative) prompt, int64 (m,). Raises UserError if a class has no prompt, or a prompt no
        class."""
        assert self.spec.prompts is not None
        prompts = self.texts["negative prompt" if negative else "prompt"]
        column = self.spec.prompts.label or self.label_column
        found = self._class_index(prompts, column, {name: i for i, name in enumerate(self.classes)})
        if bare := sorted(set(range(len(self.classes))) - set(found.tolist())):
            raise UserError(
                f"{self.spec.dataset}: class {self.classes[bare[0]]!r} has no {prompts.name}; "
                f"there are some for {', '.join(self.classes[i] for i in sorted(set(found.tolist()))) or 'none'}"
            )
        return found

    def class_problems(self, splits: tuple[Split, ...], prompts: bool = False) -> list[str]:
        """Report splits without rows, labels that are not classes, classes without prompts or without samples."""
        found: list[str] = []
        for split in splits:
            with collect(found):
                rows = np.bincount(self.labels(self.split(split)), minlength=len(self.classes))
                if bare := [name for name, count in zip(self.classes, rows, strict=True) if not count]:
                    raise UserError(
                        f"{self.spec.dataset}: class {bare[0]!r} has no {split} rows ({len(bare)} such classes)"
                    )
        if prompts:
            with collect(found):
                self.prompt_labels()
        return found

    @property
    def label_column(self) -> str:
        """Name of the label column."""
        assert self.spec.label is not None, "a suite with a classifying task has a label column"
        return self.spec.label

    def groups(self, samples: Samples) -> Objects:
        """Groups of rows that depend on each other, str (n,): `Samples.units` of the group column."""
        return samples.units(self.spec.group)

    def domains(self, samples: Samples) -> Objects:
        """Value of the domain column, str (n,), or the data set's name."""
        if self.spec.domain is None:
            return np.full(len(samples), self.spec.dataset, dtype=object)
        return samples.filled(self.spec.domain, self.spec.dataset)

    @property
    def parts(self) -> dict[str, Samples]:
        """Every set of rows that is used, by its name."""
        return {**self.splits, **self.texts}

    @property
    def rows_used(self) -> Ints:
        """Grid rows of all splits, prompts and texts, int64, ascending: a unit depends on their features."""
        return np.unique(np.concatenate([samples.rows for samples in self.parts.values()]))

    @cached_property
    def digest(self) -> str:
        """16 hex digits over every row that is used and all columns that the tasks read."""
        sha = hashlib.sha256(repr(self.classes).encode())
        for name, samples in self.parts.items():
            sha.update(f"\n{name} {samples.table.column_names}\n".encode())
            for values in samples.table.to_pydict().values():
                sha.update(repr(values).encode())
        return sha.hexdigest()[:16]

    def _class_index(self, samples: Samples, column: str, index: Mapping[Any, int]) -> Ints:
        values = samples.column(column)
        if alien := [value for value in values if value not in index]:
            first = samples.ids[list(values).index(alien[0])]
            raise UserError(
                f"{self.spec.dataset}: {column} of {len(alien)} {samples.name} rows is not one of the classes "
                f"{', '.join(value or 'blank' for value in index)}: {value_counts(alien)} (first in row {first!r}); "
                "name these values under `classes`, or leave the rows out with `rows`"
            )
        return np.array([index[value] for value in values], dtype=np.int64)


def load_dataset(spec: DatasetSpec, store: FeatureStore, also: tuple[str, ...] = ()) -> DatasetRows:
    """Find the rows of a data set, with the columns that its tasks read and `also`. Raises UserError for a column that
    the store lacks, a value that a filter names and no row has, or a key that occurs twice in a split."""
    counts: dict[str, Counter[object]] = {}
    select = partial(_select, spec.dataset, store, counts)
    splits: dict[str, Samples] = {}
    for name in SPLITS:
        chosen: RowFilter | None = getattr(spec.rows, name)
        if chosen is not None:
            splits[name] = select(name, chosen, (*spec.columns, *also))
            keys, times = np.unique(splits[name].ids, return_counts=True)
            if (times > 1).any():
                raise UserError(f"{spec.dataset}: key {str(keys[times > 1][0])!r} stands twice among the {name} rows")
    texts: dict[str, Samples] = {}
    labels = splits["test"].column(spec.label) if spec.label is not None else np.empty(0, dtype=object)
    if spec.prompts is not None:
        of = spec.prompts.label or spec.label or "key"
        texts["prompt"] = select("prompt", spec.prompts.rows, (of,))
        labels = labels if spec.label is None else texts["prompt"].column(of)
        if spec.prompts.negatives is not None:
            texts["negative prompt"] = select("negative prompt", spec.prompts.negatives, (of,))
    classes = tuple(spec.classes if spec.classes is not None else sorted({str(v) for v in labels if v is not None}))
    for section in spec.own_sections():
        texts |= {name: select(name, *asked) for name, asked in section.texts.items()}
    found = {name: rows for name, rows in texts.items() if name != "negative prompt" or len(rows)}
    return DatasetRows(spec, store, splits, found, classes, counts)


def _select(
    dataset: str,
    store: FeatureStore,
    counts: dict[str, Counter[object]],
    name: str,
    chosen: RowFilter,
    columns: tuple[str, ...],
) -> Samples:
    """Return the rows that pass `chosen`, with `columns`; the values of every column in `chosen` are counted once."""
    wanted = list(dict.fromkeys((*FIXED, *columns, *chosen)))
    # Reading the columns first gives the error that lists the store's columns.
    schema = store.sample_table(columns=wanted, filter=pc.scalar(False)).schema
    # Views, corrupted pictures and further captions of other rows' images are no samples of their own.
    present: Any = (pc.field("status") != "absent") & pc.field("image_rows").is_null()
    condition = present
    for column, values in chosen.items():
        if column not in counts:
            read = store.sample_table(columns=list(dict.fromkeys(["row", column])), filter=present)
            counted = pc.value_counts(read[column]).to_pylist()
            counts[column] = Counter({one["values"]: one["counts"] for one in counted})
        cells = {raw: cell_text(raw) or "" for raw in counts[column]}
        accepted = [raw for raw, text in cells.items() if text in values]
        named = [raw for raw in accepted if raw is not None]
        one_of = pc.field(column).isin(pa.array(named, schema.field(column).type))
        condition &= (one_of | pc.field(column).is_null()) if None in accepted else one_of
        absent = [value for value in values if value not in cells.values()]
        if absent and accepted:
            raise UserError(
                f"{dataset}: {name} rows ask for {column} {' and '.join(map(repr, absent))}, which no row "
                f"has; it has {value_counts(counts[column])}"
            )
    table = store.sample_table(columns=wanted, filter=condition)
    for position, column in enumerate(wanted):
        if column not in FIXED:
            encoded = pc.dictionary_encode(table[column]).combine_chunks()
            texts = pa.array([cell_text(value) for value in encoded.dictionary.to_pylist()], pa.string())
            table = table.set_column(position, column, texts.take(encoded.indices))
    return Samples(name, table)
