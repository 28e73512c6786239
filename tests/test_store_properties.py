"""Properties of any store: shapes, shard sizes, orders of work and failures in the middle change nothing in the end."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_store import make_card, make_index, make_selection, make_store

from mmkd.base.errors import MmkdError, StoreError
from mmkd.store import FeatureStore, TeacherCard
from mmkd.store.inputs import write_inputs
from mmkd.store.layout import rows_per_shard
from mmkd.store.record import CorpusRecord, Store, read_record
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.verify import verify
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

ENCODINGS = ("float16", "float32", "int8")
FAULTS = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EROFS)


def tree(root: Path) -> dict[str, bytes]:
    """Every file but the root's document, which holds the time of creation."""
    files = (path for path in root.rglob("*") if path.is_file() and path != root / "zarr.json")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


class Work:
    """A store to be made: two teachers of random features, not all of them sound."""

    def __init__(self, rows: int, cards: list[TeacherCard], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rows, self.cards = rows, cards
        self.values = {card.slug: rng.normal(size=(2, rows, card.dim)).astype(np.float32) for card in cards}
        self.valid = {card.slug: rng.integers(0, 4, rows, dtype=np.uint8) for card in cards}
        self.shards = -(-rows // rows_per_shard(rows))

    def begin(self, root: Path) -> None:
        """Rows and cards; may be run again after it was interrupted."""
        if not (root / "zarr.json").is_file():
            corpus = CorpusRecord(kind="t", location="-", root="/", rows=self.rows, labels=("site",), digest="d")
            create_store(root, corpus, make_index(self.rows))
        for card in self.cards:
            add_teacher(Store.open(root), card)

    def do(self, root: Path, shard: int, teacher: int) -> None:
        """What a worker does for one shard: the rows are finished by whoever comes first."""
        record, card = read_record(root), self.cards[teacher]
        span = list(iter_shards(record))[shard]
        table, sha = read_part(root, shard)
        if "pending" in table["status"].to_pylist():
            sha = write_part(root, shard, with_columns(table, {"status": ["ok"] * len(span)}))
        here = slice(span.start, span.stop)
        image, text = self.values[card.slug][:, here]
        write_shard(Store(root, record), card, shard, ShardFeatures(image, text, self.valid[card.slug][here]), sha)

    def expected(self, root: Path) -> dict[str, bytes]:
        """The store when nothing goes wrong and all goes in order."""
        self.begin(root)
        for shard in range(self.shards):
            for teacher in range(len(self.cards)):
                self.do(root, shard, teacher)
        return tree(root)


@st.composite
def works(draw: st.DrawFn) -> Work:
    # Rows up to 4,500 give shards of 256, 512 and 1,024.
    rows = draw(st.one_of(st.integers(1, 300), st.integers(2000, 4500)))
    cards = [
        make_card(f"t{number}", draw(st.integers(1, 9))).with_encoding(draw(st.sampled_from(ENCODINGS)))
        for number in range(draw(st.integers(1, 2)))
    ]
    return Work(rows, cards, draw(st.integers(0, 99)))


@settings(max_examples=8)
@given(work=works(), data=st.data())
def test_any_order_gives_the_same_bytes(work: Work, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        expected = work.expected(Path(name) / "expected")
        root = Path(name) / "s"
        work.begin(root)
        units = [(shard, teacher) for shard in range(work.shards) for teacher in range(len(work.cards))]
        for shard, teacher in data.draw(st.permutations(units + units[:2])):  # some are done twice
            work.do(root, shard, teacher)
        assert tree(root) == expected
        store = FeatureStore.open(root)
        assert store.verify(deep=True).sound
        rows = np.array(data.draw(st.lists(st.integers(-work.rows, work.rows - 1), max_size=20)), dtype=np.int64)
        found = store[rows]
        for card in work.cards:
            bits = work.valid[card.slug]
            assert np.array_equal(store.valid(card.slug), bits)
            for bit, tower in enumerate(("image", "text")):
                given_rows = np.where(bits[rows, None] >> bit & 1, work.values[card.slug][bit][rows], np.nan)
                worst = {"float16": 1e-3, "float32": 0, "int8": 4e-2}[card.encoding]
                assert np.allclose(found[f"{card.slug}/{tower}"], given_rows, rtol=worst, atol=worst, equal_nan=True)


@pytest.mark.integration
@settings(max_examples=10)
@given(work=works(), writes=st.lists(st.integers(0, 30), min_size=1, max_size=3), fault=st.sampled_from(FAULTS))
def test_a_write_that_fails_anywhere_costs_nothing_but_itself(work: Work, writes: list[int], fault: int) -> None:
    told = os.strerror(fault)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        expected = work.expected(Path(name) / "expected")
        root = Path(name) / "s"
        left, real, failed = [-1], os.fsync, 0

        def fsync(fd: int) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise OSError(fault, os.strerror(fault))
            real(fd)

        patch.setattr(os, "fsync", fsync)
        for write in [*writes, -1]:
            left[0] = write
            try:
                assert work.expected(root) == expected
            except StoreError as error:
                failed += 1
                told = str(error)
                if (root / "zarr.json").is_file():
                    report = verify(root, deep=True)
                    assert report.sound, report.problems
                    assert report.temporary == ()
                    # Whatever is claimed is right.
                    for slug in FeatureStore.open(root).teachers:
                        claimed = FeatureStore.open(root).valid(slug)
                        assert np.isin(claimed[claimed != work.valid[slug]], 0).all()
            assert os.strerror(fault) in told
            assert "\n" not in told
        assert tree(root) == expected
        assert failed <= len(writes)


def test_no_space_at_all_on_a_real_file_system(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system of 256 KB cannot be mounted here")
    try:
        with pytest.raises(StoreError, match=r"cannot write .*: No space left on device; make room"):
            make_store(small / "s", 600, [make_card("alpha", 64)])
        report = verify(small / "s", deep=True)
        assert report.sound
        assert report.temporary == ()
        assert report.entries < 3
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        record = read_record(small / "s")
        for shard, span in enumerate(iter_shards(record)):
            part = ShardFeatures(*[np.ones((len(span), 64), np.float16)] * 2, np.full(len(span), 3, np.uint8))
            write_shard(
                Store(small / "s", record), make_card("alpha", 64), shard, part, read_part(small / "s", shard)[1]
            )
        assert FeatureStore.open(small / "s").available().all()
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_byte_of_inputs_and_selections_flipped_is_found(tmp_path: Path, step: int) -> None:
    root, card = tmp_path / "s", make_card("a", 1)
    store, _ = make_store(root, 3, [card])
    rows, _ = read_part(root, 0)
    jpegs = pa.array([b"one", None, b"three"], pa.large_binary())
    write_inputs(root, 0, 8, pa.table({"row": rows["row"], "image_sha256": rows["image_sha256"], "jpeg": jpegs}))
    make_selection(store, "some", np.array([[True], [False], [True]]), [card])
    assert verify(root, deep=True).sound
    missed = []
    for path in sorted([*(root / "inputs").iterdir(), *(root / "selections/some").rglob("*")]):
        if path.is_file():
            data = path.read_bytes()
            for index in range(0, len(data), step):
                path.write_bytes(data[:index] + bytes([data[index] ^ (1 << index % 8)]) + data[index + 1 :])
                try:
                    sound = verify(root).sound
                except MmkdError:
                    sound = False
                if sound:
                    missed.append((path.name, index, chr(data[index])))
            path.write_bytes(data)
    assert missed == []
    shutil.rmtree(root / "selections/some/c")
    assert not verify(root).sound
