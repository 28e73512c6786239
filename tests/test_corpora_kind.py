"""A kind of corpus is one source file and one line of a table: configuration, listing and recognition included."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmkd.base.errors import ConfigError
from mmkd.extract.corpora import open_corpus
from mmkd.extract.corpora.opening import KINDS, Kind
from mmkd.extract.corpus_parts import read_overview
from mmkd.extract.index import create_indexed_store
from mmkd.store import FeatureStore

MODULE = """
from collections.abc import Iterator
from typing import Literal

from mmkd.extract.corpora import CorpusRow, Ignored, Part
from mmkd.extract.corpora.files import FileCorpus


class WordsCorpus(FileCorpus):
    kind: Literal["words"] = "words"
    skip: str = "#"
    suffixes = (".words",)

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        for number, line in enumerate(self.open_part(part).read().decode().splitlines(), 1):
            if line.startswith(self.skip):
                yield Ignored("line: skipped", line)
            else:
                yield CorpusRow(f"{part.name}:{number}", line, None)
"""


def test_a_kind_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words_corpus.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(KINDS, "words", Kind("words_corpus", "WordsCorpus", (".words",)))
    corpus = tmp_path / "c"
    corpus.mkdir()
    (corpus / "a.words").write_text("# no\none\ntwo\n")
    (corpus / "b.words").write_text("three\n")
    (corpus / "notes.md").write_text("")
    create_indexed_store(open_corpus(str(corpus)), tmp_path / "s")
    assert FeatureStore.open(tmp_path / "s").sample_table()["caption"].to_pylist() == ["one", "two", "three"]
    overview = read_overview(tmp_path / "s")
    assert overview is not None
    assert overview.ignored == {
        "file: .md is not read in a corpus of kind words": (1, "notes.md"),
        "line: skipped": (1, "# no"),
    }
    assert open_corpus(str(corpus / "a.words")).kind == "words"
    (tmp_path / "corpus.yaml").write_text("kind: words\npath: c\nskp: x\n")
    with pytest.raises(ConfigError, match=r"skp.*did you mean 'skip'"):
        open_corpus(str(tmp_path / "corpus.yaml"))
