"""Random tars and folders: an independent count of members agrees with the rows and with what is ignored."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.extract.corpora import Corpus, open_corpus
from mmkd.extract.corpora.pairs import PairsCorpus
from mmkd.extract.index import list_corpus

EXAMPLES = int(os.environ.get("MMKD_CORPORA_EXAMPLES", "15"))
STEMS = st.sampled_from(["0", "1", "a.b", "a", "fig.1.2", "d/0", "d/e.f", ".hidden", "ü", "a b"])
SUFFIXES = ("jpg", "JPEG", "jfif", "avif", "dcm", "txt", "caption", "npy", "jxl", "left.png", "x.txt", "")
NAMES = st.builds(lambda stem, suffix: f"{stem}.{suffix}".rstrip("."), STEMS, st.sampled_from(SUFFIXES))


def check_count(corpus: Corpus, members: int) -> None:
    """Every member is an image, a caption, or ignored."""
    overview = list_corpus(corpus)
    assert overview.images + overview.captions + sum(count for count, _ in overview.ignored.values()) == members


@settings(max_examples=EXAMPLES)
@given(st.lists(NAMES, max_size=24))
def test_every_member_of_a_tar_is_used_or_counted(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.tar")
        with tarfile.open(path, "w") as tar:
            for name in ("sound.jpg", *names):
                info = tarfile.TarInfo(name)
                info.size = 5
                tar.addfile(info, io.BytesIO(b"bytes"))
        check_count(open_corpus(str(path)), len(names) + 1)


@settings(max_examples=EXAMPLES)
@given(st.lists(NAMES, max_size=24, unique=True))
def test_every_file_of_a_folder_is_used_or_counted(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sound.jpg", *names):
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_bytes(b"bytes")
        check_count(PairsCorpus(path=folder), 1 + sum(not name.startswith(".") for name in names))
