"""The rows of one data set: which grid rows its splits are, and their labels, groups and captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmkd.evaluate.dataset_spec import DatasetSpec, RowFilter
from mmkd.store import FeatureStore, UserError

Split = Literal["test", "train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT = "split of the suite"
"""Column of joined samples; the blanks keep it apart from a label column."""
FIXED = ("row", "key", "caption", "uri", "image_sha256", "status")


@dataclass(frozen=True)
class Samples:
    """Rows of one split, in grid order."""

    name: str
    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Grid rows of the store, int64 (n,), ascending."""
        return np.asarray(self.table["row"].to_numpy(), dtype=np.int64)

    @cached_property
    def ids(self) -> NDArray[np.object_]:
        """Sample keys, str (n,)."""
        return self.column("key")

    def column(self, name: str) -> NDArray[np.object_]:
        """One column as Python objects (n,): str, or None where the table has null."""
        return np.array(self.table[name].to_pylist() or [], dtype=object)

    def matching(self, chosen: RowFilter) -> NDArray[np.bool_]:
        """Rows whose columns all have one of the accepted values, bool (n,)."""
        found = np.ones(len(self), dtype=bool)
        for name, values in chosen.items():
            found &= np.isin(self.column(name).astype(str), values)
        return found


@dataclass(frozen=True)
class DatasetRows:
    """A data set with its splits found in the store."""

    spec: DatasetSpec
    store: FeatureStore
    splits: dict[str, Samples]
    prompts: Samples | None
    negatives: Samples | None
    """Text rows that describe the absence of classes."""
    candidates: Samples | None
    """Text rows among which a question's answer is chosen."""
    classes: tuple[str, ...]
    """Class names; the position is the class index. Empty when the data set has no label column."""

    def split(self, name: Split) -> Samples:
        """The rows of one split.

        Raises:
            UserError: the suite does not define it, or it has no rows.
        """
        samples = self.splits.get(name)
        if samples is None or len(samples) == 0:
            filters = getattr(self.spec.rows, name) or {}
            asked = ", ".join(f"{column}: {' or '.join(map(str, values))}" for column, values in filters.items())
            raise UserError(f"{self.spec.dataset} has no {name} rows: {{{asked}}} matches nothing in {self.store.root}")
        return samples

    def joined(self, names: tuple[Split, ...]) -> Samples:
        """The rows of several splits as one, with a column `split` that says where each is from."""
        tables = [
            self.split(name).table.append_column(SPLIT, pa.array([name] * len(self.split(name)))) for name in names
        ]
        return Samples("+".join(names), pa.concat_tables(tables))

    def labels(self, samples: Samples) -> NDArray[np.int64]:
        """Class index of every row, int64 (n,).

        Raises:
            UserError: a row without a label, or with one that is not among the classes.
        """
        values = self.spec.classes or {name: (name,) for name in self.classes}
        index = {value: i for i, name in enumerate(self.classes) for value in values[name]}
        return self._class_index(samples, self.label_column, index)

    def prompt_labels(self, negative: bool = False) -> NDArray[np.int64]:
        """Class index of every prompt, or of every negative one, int64 (m,).

        Raises:
            UserError: a class has no prompt, or a prompt no class.
        """
        assert self.spec.prompts is not None
        prompts = self.negatives if negative else self.prompts
        assert prompts is not None
        column = self.spec.prompts.label or self.label_column
        found = self._class_index(prompts, column, {name: i for i, name in enumerate(self.classes)})
        bare = sorted(set(range(len(self.classes))) - set(found.tolist()))
        if bare:
            raise UserError(
                f"{self.spec.dataset}: class {self.classes[bare[0]]!r} has no {prompts.name}; "
                f"there are some for {', '.join(self.classes[i] for i in sorted(set(found.tolist()))) or 'none'}"
            )
        return found

    @property
    def label_column(self) -> str:
        """Name of the label column."""
        assert self.spec.label is not None, "a suite with a classifying task has a label column"
        return self.spec.label

    def groups(self, samples: Samples) -> NDArray[np.object_]:
        """What rows depend on each other, str (n,): the group column, or every row for itself.

        A row without a value in the group column is a group of its own.
        """
        if self.spec.group is None:
            return samples.ids
        values = samples.column(self.spec.group)
        return np.where(values == None, samples.ids, values)  # noqa: E711 - element by element

    def domains(self, samples: Samples) -> NDArray[np.object_]:
        """The value of the domain column, str (n,), or the data set's name."""
        if self.spec.domain is None:
            return np.full(len(samples), self.spec.dataset, dtype=object)
        values = samples.column(self.spec.domain)
        return np.where(values == None, self.spec.dataset, values)  # noqa: E711 - element by element

    @property
    def parts(self) -> dict[str, Samples]:
        """Every set of rows that is used, by its name."""
        texts = {"prompt": self.prompts, "negative prompt": self.negatives, "candidate": self.candidates}
        return {**self.splits, **{name: samples for name, samples in texts.items() if samples is not None}}

    @cached_property
    def digest(self) -> str:
        """16 hex digits over every row that is used and all that the tasks read of it, features aside."""
        sha = hashlib.sha256(repr(self.classes).encode())
        for name, samples in self.parts.items():
            sha.update(f"\n{name} {samples.table.column_names}\n".encode())
            for values in samples.table.to_pydict().values():
                sha.update(repr(values).encode())
        return sha.hexdigest()[:16]

    def _class_index(self, samples: Samples, column: str, index: dict[str, int]) -> NDArray[np.int64]:
        values = samples.column(column)
        for value, key in zip(values, samples.ids, strict=True):
            if value not in index:
                raise UserError(
                    f"{self.spec.dataset}: {samples.name} row {key!r} has {column}={value!r}, "
                    f"not one of the classes {', '.join(index)}"
                )
        return np.array([index[value] for value in values], dtype=np.int64)


def load_dataset(spec: DatasetSpec, store: FeatureStore) -> DatasetRows:
    """Find the rows of a data set.

    Raises:
        UserError: a column that the store lacks, a key that occurs twice in a split, or rows without a class.
    """
    splits: dict[str, Samples] = {}
    for name in SPLITS:
        chosen: RowFilter | None = getattr(spec.rows, name)
        if chosen is not None:
            splits[name] = _select(store, name, chosen, spec.columns)
            _refuse_duplicates(spec, splits[name])
    prompts = negatives = None
    if spec.prompts is not None:
        of = spec.prompts.label or spec.label or "key"
        prompts = _select(store, "prompt", spec.prompts.rows, (of,))
        if spec.prompts.negatives is not None:
            negatives = _select(store, "negative prompt", spec.prompts.negatives, (of,))
    candidates = None
    if spec.vqa is not None and spec.vqa.candidates is not None:
        columns = (spec.vqa.answer, spec.vqa.candidate_of)
        candidates = _select(store, "candidate", spec.vqa.candidates, columns)
    found = negatives if negatives is not None and len(negatives) else None
    return DatasetRows(spec, store, splits, prompts, found, candidates, _classes(spec, splits["test"], prompts))


def _select(store: FeatureStore, name: str, chosen: RowFilter, columns: tuple[str, ...]) -> Samples:
    wanted = list(dict.fromkeys((*FIXED, *columns, *chosen)))
    # Asking for the columns first gives the message that names those the store has.
    store.sample_table(columns=wanted, filter=pc.scalar(False))
    condition: Any = pc.field("status") != "absent"
    for column, values in chosen.items():
        kind = store.samples.schema.field(column).type
        condition &= pc.field(column).isin(pa.array(values).cast(kind))
    return Samples(name, store.sample_table(columns=wanted, filter=condition))


def _refuse_duplicates(spec: DatasetSpec, samples: Samples) -> None:
    keys, counts = np.unique(samples.ids, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"{spec.dataset}: key {str(keys[counts > 1][0])!r} stands twice among the {samples.name} rows")


def _classes(spec: DatasetSpec, test: Samples, prompts: Samples | None) -> tuple[str, ...]:
    if spec.classes is not None or spec.label is None:
        return tuple(spec.classes or ())
    if prompts is not None and spec.prompts is not None:
        values = prompts.column(spec.prompts.label or spec.label)
    else:
        values = test.column(spec.label)
    return tuple(sorted({value for value in values if value is not None}))
