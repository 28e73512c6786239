"""Corpora: what a user can point `mmkd extract` at. One file per kind; all give the same rows."""

from __future__ import annotations

from mmkd.extract.corpora.opening import open_corpus
from mmkd.extract.corpora.row import Corpus, CorpusRow, Part, corpus_digest, corpus_rows

__all__ = ["Corpus", "CorpusRow", "Part", "corpus_digest", "corpus_rows", "open_corpus"]
