"""Writing a store under attack: no room, no permission, two writers, two teachers of one name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tiny_store import every_file, found, make_card, make_index, make_store

from mmkd.base.errors import StoreError, TeacherMismatchError
from mmkd.store import FeatureStore, writer
from mmkd.store.card import read_card
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import write_part
from mmkd.store.verify import verify
from mmkd.store.writer import add_teacher, array_documents, move_corpus

TESTS = Path(__file__).parent


WRITE = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from tiny_store import make_card, make_store
from mmkd.store.record import Store
from mmkd.store.writer import add_teacher
from mmkd.base.errors import StoreError
{before}
try:
    {act}
except StoreError as error:
    print(error)
"""


def child(act: str, before: str, folder: Path) -> subprocess.Popen[str]:
    """Start a process that writes below `folder`, which is its working directory."""
    script = WRITE.format(tests=str(TESTS), act=act, before=before)
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", script], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE
    )


def test_no_space_is_one_line_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    process = child("make_store(Path('s'), 600, [make_card('alpha', 64)])", limit, tmp_path)
    (line,) = process.communicate()[0].splitlines()
    assert line.startswith("cannot write ")
    assert line.endswith(
        "s/teachers/alpha/image/loose/00000: File too large; make room or get permission, then run it again"
    )
    report = verify(tmp_path / "s")
    assert report.sound
    assert report.entries == 0
    assert not report.temporary
    assert not FeatureStore.open(tmp_path / "s").available().any()


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_no_permission_is_one_line(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 20, [make_card("alpha", 2)])
    for path in (tmp_path / "s").rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "s").chmod(0o555)
    tmp_path.chmod(0o755)
    become = "import google_crc32c\nif os.getuid() == 0: os.setresuid(65534, 65534, 65534)"
    process = child("add_teacher(Store.open('s'), make_card('beta', 2))", become, tmp_path)
    (line,) = process.communicate()[0].splitlines()
    assert line.startswith("cannot write s/teachers/")
    assert "Permission denied" in line
    for path in ((tmp_path / "s"), *(tmp_path / "s").rglob("*")):
        path.chmod(0o755)


@pytest.mark.integration
def test_two_writers_of_the_same_shards_do_no_harm(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 600, [make_card("alpha", 8)])
    before = {path: path.read_bytes() for path in every_file(tmp_path / "s")}
    again = """
    for _ in range(5):
        import tiny_store
        tiny_store.create_store = lambda root, corpus, index: Store.open(root)
        make_store(Path('s'), 600, [make_card('alpha', 8)])
    """.strip()
    writers = [child(again, "", tmp_path) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        # What the ledger vouches for is whole at any moment. (Sample parts go back to pending and forth here.)
        assert np.isfinite(FeatureStore.open(tmp_path / "s").image("alpha")).all()
    assert [writer.communicate()[0] for writer in writers] == ["", ""]
    assert {path: path.read_bytes() for path in every_file(tmp_path / "s")} == before
    assert not found(tmp_path / "s")


def test_two_teachers_of_one_name_at_once_leave_one(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "s", 20, [])
    first, second = make_card("alpha", 8), make_card("alpha", 8, weights="ff")
    # The second one looked, saw no card, and wrote its arrays when the first one's card came.
    for name, document in array_documents(store.record, second):
        path = tmp_path / "s" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(document))
    add_teacher(store, first)
    with pytest.raises(TeacherMismatchError):
        add_teacher(store, second)
    assert read_card(tmp_path / "s", "alpha") == first


def test_an_append_by_a_record_that_is_old_by_now_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "s"
    store, _ = make_store(root, 3, [make_card("alpha", 8)])
    other = CorpusRecord(kind="test", location="there", root="/else", rows=2, labels=("site",), digest="e")
    index = make_index(2)
    index = index.set_column(0, index.schema.field(0), pa.array([256, 257]))

    def while_another_writes(root: Path, shard: int, part: pa.Table) -> str:
        move_corpus(root, Path("/moved"))
        return write_part(root, shard, part)

    with monkeypatch.context() as patched:
        patched.setattr(writer, "write_part", while_another_writes)
        with pytest.raises(StoreError, match="was changed by another process meanwhile; nothing was appended"):
            writer.append_rows(store, other, index)
    assert FeatureStore.open(root).record.rows == 3
    writer.append_rows(Store.open(root), other, index)
    before = {path: path.read_bytes() for path in every_file(root)}
    mine = index.set_column(1, "key", pa.array(["mine0", "mine1"]))
    with pytest.raises(StoreError, match="was changed by another process meanwhile"):
        writer.append_rows(store, other, mine)
    assert {path: path.read_bytes() for path in every_file(root)} == before
