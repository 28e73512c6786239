"""Part of a corpus, as a corpus: its first rows, or its rows that have what the user requires."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from mmkd.extract.corpora import CorpusRow, Ignored, Part, corpus_digest
from mmkd.extract.corpora.row import ONE_SIDED, DerivedCorpus

Require = Literal["pairs", "images", "texts"]
_NEEDED = {"pairs": ("image", "caption"), "images": ("image",), "texts": ("caption",)}


@dataclass(frozen=True)
class LimitedCorpus(DerivedCorpus):
    """The first `limit` rows (all when None), of which those that lack what is required are failed."""

    limit: int | None = None
    require: Require | None = None
    """`pairs`: both sides; `images` or `texts`: this side, and the other may be missing."""
    count_rest: bool = True
    """Count what the limit leaves out: rows of the parts that were begun, and the other parts."""

    @property
    def location(self) -> str:
        return self.corpus.location + (f" (first {self.limit} rows)" if self.limit is not None else "")

    def settings(self) -> str:
        """Return the corpus' settings and the choice of rows, so that their stores are not mixed."""
        first = f" first {self.limit}" if self.limit is not None else ""
        return f"{self.corpus.settings()}{first}" + (f" require {self.require}" if self.require else "")

    def parts(self) -> Sequence[Part]:
        """Return the corpus' own; with a limit one, as the number of rows of a part is known only when it is listed."""
        parts = self.corpus.parts()
        if self.limit is None:
            return parts
        return (Part(f"first {self.limit} rows", sum(part.size for part in parts), corpus_digest(self.corpus, parts)),)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield the part's inputs, or the first rows of all parts and ignored files."""
        if self.limit is None:
            yield from (row if isinstance(row, Ignored) else self._require(row) for row in self.corpus.rows_of(part))
            return
        left, reason = self.limit, f"after the first {self.limit} rows (--limit)"
        for one in self.corpus.parts():
            if left <= 0 and self.count_rest:
                yield Ignored(f"file: {reason}", one.name)
            for row in self.corpus.rows_of(one) if left > 0 else ():
                if isinstance(row, Ignored):
                    yield row
                elif left > 0:
                    yield self._require(row)
                elif self.count_rest:
                    yield Ignored(f"row: {reason}", row.key)
                else:
                    return
                left -= isinstance(row, CorpusRow)

    def _require(self, row: CorpusRow) -> CorpusRow:
        if self.require is None or row.by_design:
            return row
        fault = None if row.fault in ONE_SIDED else row.fault
        lacking = [side for side, missing in (("image", row.uri is None), ("caption", not row.caption)) if missing]
        wrong = next((side for side in lacking if side in _NEEDED[self.require]), None)
        if wrong is not None:
            return dataclasses.replace(row, fault=fault or f"row: no {wrong}, left out by --require {self.require}")
        caption = row.caption or (row.caption if fault else None)  # an empty caption counts as absent
        return dataclasses.replace(row, fault=fault, caption=caption, by_design=bool(lacking))
