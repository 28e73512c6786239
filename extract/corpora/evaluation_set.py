"""The description of an evaluation set as a corpus: its images or questions, what a table knows of them, its prompts.
`mmkd extract` reads `source` and `prompts` of the description; all else belongs to `mmkd evaluate`."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pydantic import Field

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError
from mmkd.base.places.reading import list_files
from mmkd.base.places.remote import as_root
from mmkd.base.text import cell_text
from mmkd.extract.corpora.files import fits
from mmkd.extract.corpora.row import CorpusRow, DerivedCorpus, Ignored, Part
from mmkd.extract.corpora.tabular import read_lines
from mmkd.store.evaluation_rows import CANDIDATE, KIND, SAMPLE, TEXT_OF, PromptFile
from mmkd.store.samples import FIXED_COLUMNS

SPLIT, FOLD = "split", "fold"
_PROMPTS = "prompts"
# Cells of Patho-Bench's fold columns and of CLAM's split files.
_TEST = "test"


class Draw(Frozen):
    """Shares of the splits of a set that has none published. They are expectations: every sample, or group of samples,
    falls by a hash of its own, so that its split never depends on other samples."""

    train: float = Field(default=0.0, ge=0, le=1)
    val: float = Field(default=0.0, ge=0, le=1)
    test: float = Field(gt=0, le=1)
    by: str = "key"
    """Unit of splitting: the sample's `key`, its file's `name` or `stem`, or a label such as the patient."""
    seed: int = 0

    def faults(self) -> Iterator[str]:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-9:
            yield f"shares of draw make {total:g}, expected 1"

    def split(self, dataset: str, value: str | None) -> str | None:
        """Return the split of a value, which is compared as all text is; None for no value."""
        if (value := cell_text(value)) is None:
            return None
        digest = hashlib.sha256(f"{dataset}/{self.seed}/{value}".encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.test:
            return "test"
        return "val" if place < self.test + self.val else "train"


class Join(Frozen):
    """Columns of a table (commas, tabs or semicolons, by its header) or Parquet file for the samples of a corpus."""

    table: str | None = None
    """In a description, relative to it."""
    key: str
    """Column of the table that identifies the line's sample."""
    match: str = "key"
    """Sample field to look up: its `key`, the image's file name (`name`; `stem` without suffix) or a label."""
    columns: tuple[str, ...] | None = None
    """Columns to take; all others when not given."""
    fold_columns: str | None = None
    """Prefix of columns that hold `train` and `test` of one fold each (`fold_` in Patho-Bench); they become `fold`."""
    fold_files: tuple[str, ...] = ()
    """CSV files, one for each fold, whose column `test` lists keys, as CLAM writes them; they become `fold`."""

    def faults(self) -> Iterator[str]:
        if self.table is None and not self.fold_files:
            yield "join needs `table` or `fold_files`"
        if self.fold_columns is not None and (self.table is None or self.fold_files):
            yield "join takes folds from `fold_columns` of its `table` or from `fold_files`, not from both"

    @property
    def labels(self) -> tuple[str, ...]:
        return self._content[0]

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._content).encode()).hexdigest()

    def values(self, key: str | None) -> dict[str, str | None]:
        """Return the columns of one sample; nulls where the table does not have it."""
        return self._content[1].get(cell_text(key) or "") or dict.fromkeys(self.labels)

    @functools.cached_property
    def _content(self) -> tuple[tuple[str, ...], dict[str, dict[str, str | None]]]:
        """Names of the joined columns, and their values by key."""
        found: dict[str, dict[str, str | None]] = {}
        columns = self._add_table(found, read_lines(as_root(self.table))) if self.table is not None else ()
        if not self.fold_files:
            return columns, found
        tested: dict[str, str] = {}
        for number, file in enumerate(self.fold_files):
            lines = read_lines(as_root(file))
            if not lines or _TEST not in lines[0]:
                raise CorpusError(f"{file} has no column {_TEST!r}; expected CLAM's columns train, val and test")
            for key in filter(None, dict.fromkeys(cell_text(line[_TEST]) for line in lines)):
                if key in tested:
                    raise CorpusError(
                        f"{file}: {key!r} is tested here and in fold {tested[key]} too; expected once "
                        "(splits drawn anew for each file are no cross-validation)"
                    )
                tested[key] = str(number)
        for key in {**found, **tested}:
            found.setdefault(key, dict.fromkeys(columns))[FOLD] = tested.get(key)
        return (*columns, FOLD), found

    def _add_table(
        self, found: dict[str, dict[str, str | None]], lines: list[dict[str, str | None]]
    ) -> tuple[str, ...]:
        """Add the table's lines, and return its columns. Lines of one key (a patient's slides) must agree in these."""
        header = tuple(lines[0]) if lines else ()
        folds = [name for name in header if self.fold_columns and name.startswith(self.fold_columns)]
        for name in (self.key, *(self.columns or ())):
            if name not in header:
                raise CorpusError(f"{self.table} has no column {name!r}; it has {', '.join(header[:20]) or 'no rows'}")
        if self.fold_columns and not folds:
            raise CorpusError(f"{self.table} has no column that begins with {self.fold_columns!r} (fold_columns)")
        columns = self.columns or tuple(name for name in header if name != self.key and name not in folds)
        if taken := [name for name in columns if name in FIXED_COLUMNS.names]:
            raise CorpusError(
                f"{self.table}: column {taken[0]!r} has the name of a column of the sample table; "
                "list the others as `columns` of the join, or rename it"
            )
        for line in lines:
            key, values = cell_text(line[self.key]), {name: line[name] for name in columns}
            if not key:
                raise CorpusError(f"{self.table}: a line has nothing in column {self.key!r}; every line needs its key")
            if folds:
                tested = [name for name in folds if (line[name] or "").strip().lower() == _TEST]
                if len(tested) != 1:
                    raise CorpusError(
                        f"{self.table}: {key!r} is {_TEST!r} in {len(tested)} of the columns {', '.join(folds)}; "
                        "expected one: a sample is tested once"
                    )
                values[FOLD] = tested[0].removeprefix(self.fold_columns or "")
            before = found.setdefault(key, values)
            for name, value in values.items():
                if cell_text(before[name]) != cell_text(value):
                    raise CorpusError(
                        f"{self.table}: {key!r} has {name} {before[name]!r} on one line and {value!r} on another; "
                        f"take columns that are one per {self.key} (`columns`), or join on another key"
                    )
        return (*columns, FOLD) if folds else columns


@dataclass(frozen=True, kw_only=True)
class EvaluationSet(DerivedCorpus):
    """Samples of the source, then the prompts; labels are the source's, the table's, `split`, `row_kind`, `text_of`."""

    name: str
    modality: str | None = None
    """Modality of samples whose source has none."""
    splits: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Split to patterns of part names (files, or top folders); other parts are left out."""
    join: Join | None = None
    draw: Draw | None = None
    prompts: PromptFile | None = None

    @property
    def kind(self) -> str:
        return f"evaluation set ({self.corpus.kind})"

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, each once. Raises CorpusError if the joined table has a column that the source has too."""
        own, joined = self.corpus.labels, self.join.labels if self.join else ()
        fields = ("key", "name", "stem", *own)
        if self.join and (both := sorted(set(own) & set(joined))):
            raise CorpusError(
                f"{self.name}: column {both[0]!r} of {self.join.table} is a label of {self.corpus.location} already; "
                "list the others as `columns` of the join"
            )
        if self.join and self.join.match not in fields:
            raise CorpusError(f"{self.name}: join matches {self.join.match!r}, expected {', '.join(fields)}")
        if self.draw and self.draw.by not in (*fields, *joined):
            raise CorpusError(f"{self.name}: draw is by {self.draw.by!r}, expected {', '.join((*fields, *joined))}")
        split = (SPLIT,) if self.splits or self.draw else ()
        return tuple(dict.fromkeys((*own, *joined, *split, KIND, TEXT_OF)))

    def settings(self) -> str:
        joined = self.join and [self.join.model_dump_json(exclude={"table", "fold_files"}), self.join.digest]
        drawn = self.draw and self.draw.model_dump()
        return json.dumps([self.corpus.settings(), self.splits, joined, drawn, self.modality])

    def parts(self) -> Sequence[Part]:
        """Return those of the splits. Raises CorpusError for a split without files, and a file in two."""
        parts = [part for part in self.corpus.parts() if not self.splits or self._split(part.name)]
        for split, patterns in self.splits.items():
            if not (mine := [part.name for part in parts if fits(part.name, patterns)]):
                there = ", ".join(file.name for file in islice(list_files(as_root(self.corpus.location)), 10))
                raise CorpusError(
                    f"{self.name}: {split} is {', '.join(patterns)}, which fits none of {there or 'nothing'} "
                    f"in {self.corpus.location}"
                )
            for stray in (name for name in mine if self._split(name) != split):
                raise CorpusError(f"{self.name}: {stray} belongs to the splits {self._split(stray)} and {split}")
        if self.prompts is None:
            return parts
        texts = json.dumps(list(self.prompts.prompts()))
        return [*parts, Part(_PROMPTS, len(texts), hashlib.sha256(texts.encode()).hexdigest())]

    def ignored(self) -> Iterator[Ignored]:
        yield from self.corpus.ignored()
        parts = self.corpus.parts() if self.splits else ()
        yield from (Ignored("file: in none of the `splits`", part.name) for part in parts if not self._split(part.name))

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        if part.name == _PROMPTS and self.prompts is not None:
            for prompt in self.prompts.prompts():
                labels: dict[str, str | None] = {KIND: prompt.kind, TEXT_OF: prompt.of}
                yield CorpusRow(prompt.key, prompt.text, None, labels=labels, by_design=True)
            return
        split = self._split(part.name)
        for row in self.corpus.rows_of(part):
            if isinstance(row, Ignored):
                yield row
                continue
            joined = {} if self.join is None else self.join.values(_sample_field(row, self.join.match))
            labels, key = {KIND: SAMPLE, TEXT_OF: None} | row.labels | joined, row.key
            if self.draw is not None:
                labels[SPLIT] = self.draw.split(self.name, labels.get(self.draw.by) or _sample_field(row, self.draw.by))
            if split is not None:
                # Archives of two splits number their samples alike.
                labels[SPLIT], key = split, f"{split}/{row.key}"
                if labels[KIND] == CANDIDATE:
                    labels[TEXT_OF] = f"{split}/{labels[TEXT_OF]}"
            yield dataclasses.replace(row, key=key, labels=labels, modality=row.modality or self.modality)

    def _split(self, name: str) -> str | None:
        return next((split for split, patterns in self.splits.items() if fits(name, patterns)), None)


def _sample_field(row: CorpusRow, what: str) -> str | None:
    """Return the key of a sample, its file's name, that without suffix, or one of its labels."""
    if what == "key":
        return row.key
    if what in ("name", "stem"):
        name = (row.uri or row.key).rpartition("/")[2]
        return name if what == "name" else name.rpartition(".")[0] or name
    return row.labels.get(what)
