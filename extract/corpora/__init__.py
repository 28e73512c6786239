"""Corpora that `mmkd extract` reads: one file per kind, and the same rows from all of them."""

from mmkd.extract.corpora.opening import open_corpus
from mmkd.extract.corpora.row import Corpus, CorpusRow, Ignored, Part, corpus_digest, corpus_rows

__all__ = ["Corpus", "CorpusRow", "Ignored", "Part", "corpus_digest", "corpus_rows", "open_corpus"]
