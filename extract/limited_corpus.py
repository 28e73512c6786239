"""The first rows of a corpus, as a corpus: to see on a small store what the whole would give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mmkd.extract.corpora import Corpus, CorpusRow, Part, corpus_digest, corpus_rows


@dataclass(frozen=True)
class LimitedCorpus:
    """The first `limit` rows; everything else is the corpus' own."""

    corpus: Corpus
    limit: int

    @property
    def kind(self) -> str:
        """As the corpus'."""
        return self.corpus.kind

    @property
    def location(self) -> str:
        """What the user named, and how much of it."""
        return f"{self.corpus.location} (first {self.limit} rows)"

    @property
    def root(self) -> str:
        """As the corpus'."""
        return self.corpus.root

    @property
    def labels(self) -> tuple[str, ...]:
        """As the corpus'."""
        return self.corpus.labels

    def settings(self) -> str:
        """Other ones than those of the whole corpus: their stores are not to be mixed."""
        return f"{self.corpus.settings()} first {self.limit}"

    def parts(self) -> Sequence[Part]:
        """One part: how many rows the corpus' own parts have is known only when they are listed."""
        parts = self.corpus.parts()
        size = sum(part.size for part in parts)
        return (Part(f"first {self.limit} rows", size, corpus_digest(self.corpus, parts)),)

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """The first rows."""
        return islice(corpus_rows(self.corpus), self.limit)
