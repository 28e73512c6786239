"""The description of an evaluation set as a corpus: its images or questions, what a table knows of them, its prompts.
`mmkd extract` reads `source` and `prompts` of the description; all else belongs to `mmkd evaluate`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from pydantic import Field, model_validator

from mmkd.base.config import Frozen
from mmkd.base.errors import CorpusError
from mmkd.base.places.reading import list_files
from mmkd.base.places.remote import as_root
from mmkd.base.text import cell_text
from mmkd.extract.corpora.files import fits
from mmkd.extract.corpora.join import Join
from mmkd.extract.corpora.row import Corpus, CorpusRow, Ignored, Part
from mmkd.store.evaluation_rows import CANDIDATE, KIND, SAMPLE, TEXT_OF, PromptFile

SPLIT = "split"
_PROMPTS = "prompts"
_OF_A_SAMPLE = ("key", "name", "stem")


class Draw(Frozen):
    """Shares of the splits of a set that has none published. They are expectations: every sample, or group of samples,
    falls by a hash of its own, so that its split never depends on other samples."""

    train: float = Field(default=0.0, ge=0, le=1)
    val: float = Field(default=0.0, ge=0, le=1)
    test: float = Field(gt=0, le=1)
    by: str = "key"
    """Unit of splitting: the sample's `key`, its file's `name` or `stem`, or a label such as the patient."""
    seed: int = 0

    @model_validator(mode="after")
    def _shares_are_one(self) -> Draw:
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-9:
            raise ValueError(f"shares of draw make {total:g}, expected 1")
        return self

    def split(self, dataset: str, value: str | None) -> str | None:
        """Return the split of a value, compared as `cell_text` does; None for no value."""
        value = cell_text(value)
        if value is None:
            return None
        digest = hashlib.sha256(f"{dataset}/{self.seed}/{value}".encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        if place < self.test:
            return "test"
        return "val" if place < self.test + self.val else "train"


@dataclass(frozen=True)
class EvaluationSet:
    """Samples of `source`, then the prompts; labels are the source's, the table's, `split`, `row_kind`, `text_of`."""

    name: str
    source: Corpus
    modality: str | None = None
    """Modality of samples whose source has none."""
    splits: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Split to patterns of part names (files, or top folders); other parts are left out."""
    join: Join | None = None
    draw: Draw | None = None
    prompts: PromptFile | None = None

    @property
    def kind(self) -> str:
        """Source's kind, marked as an evaluation set."""
        return f"evaluation set ({self.source.kind})"

    @property
    def location(self) -> str:
        """The source's."""
        return self.source.location

    @property
    def root(self) -> str:
        """The source's."""
        return self.source.root

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Label columns, each once. Raises CorpusError if the joined table has a column that the source has too."""
        own = self.source.labels
        joined = () if self.join is None else self.join.labels
        both = sorted(set(own) & set(joined))
        if both and self.join is not None:
            raise CorpusError(
                f"{self.name}: column {both[0]!r} of {self.join.table} is a label of {self.source.location} already; "
                "list the others as `columns` of the join"
            )
        if self.join is not None and self.join.match not in (*_OF_A_SAMPLE, *own):
            raise CorpusError(
                f"{self.name}: join matches {self.join.match!r}, expected {', '.join((*_OF_A_SAMPLE, *own))}"
            )
        split = (SPLIT,) if self.splits or self.draw else ()
        if self.draw is not None and self.draw.by not in (*_OF_A_SAMPLE, *own, *joined):
            raise CorpusError(
                f"{self.name}: draw is by {self.draw.by!r}, expected {', '.join((*_OF_A_SAMPLE, *own, *joined))}"
            )
        return tuple(dict.fromkeys((*own, *joined, *split, KIND, TEXT_OF)))

    def settings(self) -> str:
        """Reading and splitting settings, with hashes of joined files."""
        joined = (
            None
            if self.join is None
            else [self.join.model_dump_json(exclude={"table", "fold_files"}), self.join.digest]
        )
        drawn = None if self.draw is None else self.draw.model_dump()
        return json.dumps([self.source.settings(), self.splits, joined, drawn, self.modality])

    def parts(self) -> Sequence[Part]:
        """Return those of the source that belong to a split, then one for all prompts."""
        parts = [part for part in self.source.parts() if not self.splits or self._split(part.name)]
        if self.splits:
            self._check_splits([part.name for part in parts])
        if self.prompts is None:
            return parts
        texts = json.dumps(list(self.prompts.prompts()))
        return [*parts, Part(_PROMPTS, len(texts), hashlib.sha256(texts.encode()).hexdigest())]

    def ignored(self) -> Iterator[Ignored]:
        """Yield those of the source, and its parts in no split."""
        yield from self.source.ignored()
        parts = self.source.parts() if self.splits else ()
        yield from (Ignored("file: in none of the `splits`", part.name) for part in parts if not self._split(part.name))

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield samples of one part, or the prompts."""
        if part.name == _PROMPTS:
            yield from self._prompt_rows()
            return
        split = self._split(part.name)
        for row in self.source.rows_of(part):
            if isinstance(row, Ignored):
                yield row
                continue
            labels = {KIND: SAMPLE, TEXT_OF: None} | row.labels | self._joined(row)
            key = row.key
            if self.draw is not None:
                labels[SPLIT] = self.draw.split(self.name, labels.get(self.draw.by) or _looked_up(row, self.draw.by))
            if split is not None:
                # Archives of two splits number their samples alike.
                labels[SPLIT], key = split, f"{split}/{row.key}"
                if labels[KIND] == CANDIDATE:
                    labels[TEXT_OF] = f"{split}/{labels[TEXT_OF]}"
            yield dataclasses.replace(row, key=key, labels=labels, modality=row.modality or self.modality)

    def _joined(self, row: CorpusRow) -> dict[str, str | None]:
        return {} if self.join is None else self.join.values(_looked_up(row, self.join.match))

    def _prompt_rows(self) -> Iterator[CorpusRow]:
        assert self.prompts is not None, "only a set with prompts has this part"
        for prompt in self.prompts.prompts():
            yield CorpusRow(
                prompt.key, prompt.text, None, labels={KIND: prompt.kind, TEXT_OF: prompt.of}, by_design=True
            )

    def _split(self, name: str) -> str | None:
        return next((split for split, patterns in self.splits.items() if fits(name, patterns)), None)

    def _check_splits(self, names: list[str]) -> None:
        """Refuse a split without files, and a file in two. Raises CorpusError if a pattern is wrong."""
        for split, patterns in self.splits.items():
            mine = [name for name in names if fits(name, patterns)]
            if not mine:
                first = islice(list_files(as_root(self.source.location)), 10)
                there = ", ".join(file.name for file in first) or "nothing"
                raise CorpusError(
                    f"{self.name}: {split} is {', '.join(patterns)}, which fits none of {there} "
                    f"in {self.source.location}"
                )
            strays = [name for name in mine if self._split(name) != split]
            if strays:
                raise CorpusError(
                    f"{self.name}: {strays[0]} belongs to the splits {self._split(strays[0])} and {split}"
                )


def _looked_up(row: CorpusRow, what: str) -> str | None:
    """Return the key of a sample, its file's name, that without suffix, or one of its labels."""
    if what == "key":
        return row.key
    if what in ("name", "stem"):
        name = (row.uri or row.key).rpartition("/")[2]
        return name if what == "name" else name.rpartition(".")[0] or name
    return row.labels.get(what)
