"""The first rows of a corpus, as a corpus: to see on a small store what the whole would give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mmkd.extract.corpora import Corpus, CorpusRow


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
    def root(self) -> Any:
        """As the corpus'."""
        return self.corpus.root

    @property
    def labels(self) -> tuple[str, ...]:
        """As the corpus'."""
        return self.corpus.labels

    def digest(self) -> str:
        """Another one than that of the whole corpus: their stores are not to be mixed."""
        return hashlib.sha256(f"{self.corpus.digest()} {self.limit}".encode()).hexdigest()

    def rows(self) -> Iterator[CorpusRow]:
        """The first rows."""
        return islice(self.corpus.rows(), self.limit)
