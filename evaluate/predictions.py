"""Per-sample predictions of a task: all that is stored, and the source of all scores."""

import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmkd.base.arrays import Bools, Floats, Ints, Objects
from mmkd.base.errors import CorruptStoreError, faults_as
from mmkd.evaluate.calibration import best_temperature

_META = b"mmkd.evaluate"
SUBGROUP = "subgroup "
"""Before the name of a column of subgroups."""


@dataclass(frozen=True)
class Validation:
    """Probabilities, float64 (m, C), and classes, int64 (m,), of validation samples that nothing was fitted on."""

    y: Ints
    score: Floats

    @cached_property
    def temperature(self) -> float:
        """The temperature with the lowest log-loss."""
        return best_temperature(self.y, self.score)

    def threshold(self, coverage: float) -> float:
        """Return the least probability of a class in a split conformal set (Vovk et al. 2005; Sadinle, Lei and
        Wasserman 2019): sets hold the true class of a further sample with at least this chance. 0 where m is too small:
        all classes are then in the set."""
        rank = math.ceil((len(self.y) + 1) * coverage - 1e-9)
        own = np.sort(self.score[np.arange(len(self.y)), self.y])[::-1]
        return float(own[rank - 1]) if rank <= len(own) else 0.0


@dataclass(frozen=True)
class Predictions:
    """One unit's answers for n samples (or queries), in grid order. Arrays are (n,), score is (n, len(columns))."""

    ids: Objects
    """Sample keys; unique."""
    group: Objects
    """What intervals resample as a whole."""
    domain: Objects
    """What tables may divide by."""
    y: Ints | None
    """Class index, or None where the task has no label."""
    score: Floats
    """Class probabilities, or ranks and the like; NaN where not available."""
    available: Bools
    """False where the model has no features for the sample. Such rows are never scored."""
    columns: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)
    """`warnings`: sentences that every table shows. `undefined`: by metric, why it has no value. `choices`: see
    `choices_digest`; models that had other choices are not compared as they stand."""
    fold: Ints | None = None
    """Part of a cross-validation that tested the sample, or None where there was one test set."""
    subgroups: dict[str, Objects] = field(default_factory=dict)
    """By column, the subgroup of every sample, str (n,), `""` where the sample is in none."""
    validation: Validation | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        assert self.score.shape == (n, len(self.columns)), "one score column for each name"
        assert len(self.group) == len(self.domain) == len(self.available) == n, "one entry for each sample"
        assert not np.isnan(self.score[self.available]).any(), "an available row has scores"

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self) -> Ints:
        assert self.y is not None, "a classifying task stores labels"
        return self.y

    def fold_masks(self) -> list[Bools]:
        """Samples of each fold, bool (n,) each; all of them where there was one test set."""
        if self.fold is None:
            return [np.ones(len(self), dtype=bool)]
        return [self.fold == number for number in np.unique(self.fold)]

    def column(self, name: str) -> Floats:
        return self.score[:, self.columns.index(name)]

    def take(self, mask: Bools) -> "Predictions":
        names = ("ids", "group", "domain", "y", "score", "available", "fold")
        rows: dict[str, Any] = {name: None if (v := getattr(self, name)) is None else v[mask] for name in names}
        rows["subgroups"] = {name: values[mask] for name, values in self.subgroups.items()}
        return replace(self, **rows)


def choices_digest(names: Iterable[object]) -> str:
    """16 hex digits for the keys of gallery items, candidates or prompts that a model has features of."""
    return hashlib.sha256("\0".join(sorted(map(str, names))).encode()).hexdigest()[:16]


def encode_predictions(predictions: Predictions) -> bytes:
    """Return the bytes of a Parquet file: id, group, domain, y, fold, available, one list of scores and the
    subgroups of a row; validation samples are in its metadata."""
    (n, width), held = predictions.score.shape, predictions.validation
    scores = pa.FixedSizeListArray.from_arrays(pa.array(predictions.score.reshape(-1)), width)
    subgroups = {f"{SUBGROUP}{name}": pa.array(v.tolist(), pa.string()) for name, v in predictions.subgroups.items()}
    table = pa.table(
        {
            "id": pa.array(predictions.ids.tolist(), type=pa.string()),
            "group": pa.array(predictions.group.tolist(), type=pa.string()),
            "domain": pa.array(predictions.domain.tolist(), type=pa.string()),
            "y": pa.nulls(n, pa.int64()) if predictions.y is None else pa.array(predictions.y),
            "fold": pa.nulls(n, pa.int64()) if predictions.fold is None else pa.array(predictions.fold),
            "available": pa.array(predictions.available),
            "score": scores,
        }
        | subgroups
    )
    meta = {
        "columns": predictions.columns,
        "info": predictions.info,
        "labelled": predictions.y is not None,
        "folded": predictions.fold is not None,
        "validation": held and {"y": held.y.tolist(), "score": held.score.tolist()},
    }
    table = table.replace_schema_metadata({_META: json.dumps(meta, sort_keys=True).encode()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_predictions(path: Path) -> Predictions:
    """Read a file of `encode_predictions`. Raises CorruptStoreError if it is missing, or not such a file."""
    errors = (OSError, pa.ArrowInvalid, KeyError, ValueError)
    with faults_as(CorruptStoreError, errors, f"predictions {path} cannot be read", "; run the suite again"):
        table = pq.read_table(path)
        meta = json.loads((table.schema.metadata or {})[_META])
    columns, held = tuple(meta["columns"]), meta["validation"]
    flat = table["score"].combine_chunks().values.to_numpy(zero_copy_only=False)
    return Predictions(
        ids=np.array(table["id"].to_pylist(), dtype=object),
        group=np.array(table["group"].to_pylist(), dtype=object),
        domain=np.array(table["domain"].to_pylist(), dtype=object),
        y=table["y"].to_numpy().astype(np.int64) if meta["labelled"] else None,
        score=np.asarray(flat, dtype=np.float64).reshape(table.num_rows, len(columns)),
        available=table["available"].to_numpy(),
        columns=columns,
        info=meta["info"],
        fold=table["fold"].to_numpy().astype(np.int64) if meta["folded"] else None,
        subgroups={
            name.removeprefix(SUBGROUP): np.array(table[name].to_pylist(), dtype=object)
            for name in table.column_names
            if name.startswith(SUBGROUP)
        },
        validation=held and Validation(np.array(held["y"], np.int64), np.array(held["score"], np.float64)),
    )
