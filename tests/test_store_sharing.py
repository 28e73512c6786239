"""A store shared by threads, forked and spawned processes, and with a writer: same values, never a write."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from tiny_store import make_card, make_store
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mmkd.store import FeatureStore
from mmkd.store.samples import read_part
from mmkd.store.writer import ShardFeatures, write_shard


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A store of 600 rows that nobody changes, and what was written into it. beta is 5 wide, so it is not mapped."""
    root = tmp_path_factory.mktemp("sharing") / "store"
    _, written = make_store(root, 600, [make_card("alpha", 8), make_card("beta", 5)])
    return root, written


def test_threads_that_open_an_array_together_get_one_array(shared: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, written = shared
    for _ in range(20):
        store, start = FeatureStore.open(root), Barrier(8)

        def read(seed: int, store: FeatureStore = store, start: Barrier = start) -> tuple[int, bool]:
            rows = np.random.default_rng(seed).integers(0, 600, 64)
            start.wait()
            values = store.image("alpha")
            return id(values), np.array_equal(values[rows], written["alpha/image"][rows])

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read, range(8)))
        assert len({identity for identity, _ in found}) == 1
        assert all(equal for _, equal in found)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_loader_workers_read_the_same(shared: tuple[Path, dict[str, np.ndarray]], method: str) -> None:
    root, written = shared
    store = FeatureStore.open(root)
    assert store.image("alpha")[0].any()  # mapped before the workers start: they inherit or reopen it
    batches = BatchSampler(SequentialSampler(store), 100, drop_last=False)
    loader = DataLoader(store, sampler=batches, batch_size=None, num_workers=2, multiprocessing_context=method)
    found = list(loader)
    for name, values in written.items():
        assert np.array_equal(torch.cat([batch[name] for batch in found]).numpy(), values)
    assert torch.cat([torch.as_tensor(batch["row"]) for batch in found]).tolist() == list(range(600))


def test_single_rows_collate_too(shared: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, written = shared
    batch = next(iter(DataLoader(FeatureStore.open(root), batch_size=16)))
    assert np.array_equal(batch["beta/text"].numpy(), written["beta/text"][:16])


def test_rows_are_counted_as_in_a_list(shared: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, written = shared
    store = FeatureStore.open(root)
    assert store[-1]["row"] == 599
    assert np.array_equal(store[[-1, 0]]["alpha/text"], written["alpha/text"][[-1, 0]])
    store[3]["alpha/image"][:] = 0  # a copy
    assert np.array_equal(store[3]["alpha/image"], written["alpha/image"][3])
    for row in (600, -601, [0, 600]):
        with pytest.raises(IndexError, match="has 600 rows"):
            store[row]


def test_pickling_a_store_copies_no_features(shared: tuple[Path, dict[str, np.ndarray]]) -> None:
    store = FeatureStore.open(shared[0])
    store.image("alpha")
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).image("alpha"), store.image("alpha"))


@pytest.mark.parametrize("slug", ["alpha", "beta"])
def test_features_cannot_be_written_to(shared: tuple[Path, dict[str, np.ndarray]], slug: str) -> None:
    values = FeatureStore.open(shared[0]).image(slug)
    with pytest.raises(ValueError, match="read-only"):
        values[0, 0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        values.flags.writeable = True


def test_writing_past_numpy_is_a_fault_not_a_change(shared: tuple[Path, dict[str, np.ndarray]]) -> None:
    chunk = shared[0] / "teachers/alpha/image/loose/00000"
    before = chunk.read_bytes()
    script = (
        "import ctypes, faulthandler\n"
        "from mmkd.store import FeatureStore\n"
        f"values = FeatureStore.open({str(shared[0])!r}).image('alpha')\n"
        "print('read', bool(values[0].any()), flush=True)\n"
        "ctypes.memset(values.ctypes.data, 0, 2)\n"
        "print('written', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "read True\n"
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS)
    assert chunk.read_bytes() == before


def test_a_shard_replaced_while_mapped_changes_nothing_for_who_has_it_open(tmp_path: Path) -> None:
    card = make_card("alpha", 8)
    store, written = make_store(tmp_path / "s", 600, [card])
    early = FeatureStore.open(tmp_path / "s")
    values = early.image("alpha")
    other = np.full((256, 8), 7, np.float16)
    sha = read_part(tmp_path / "s", 1)[1]
    write_shard(store, card, 1, ShardFeatures(other, other, np.full(256, 3, np.uint8)), sha)
    assert np.array_equal(values, written["alpha/image"])
    late = FeatureStore.open(tmp_path / "s").image("alpha")
    assert (late[256:512] == 7).all()
    assert np.array_equal(late[:256], written["alpha/image"][:256])
    # Gone from the folder altogether: who has it mapped still reads it.
    (tmp_path / "s/teachers/alpha/image/loose/00001").unlink()
    assert np.array_equal(values, written["alpha/image"])
    assert (late[256:512] == 7).all()


class _Cells(HTMLParser):
    """Tags, and the text of the cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scopes: list[str | None] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag, and what a header cell is for."""
        self.tags.append(tag)
        if tag == "th":
            self.scopes.append(dict(attrs).get("scope"))

    def handle_data(self, data: str) -> None:
        """Note the text."""
        self.texts.append(data)


def test_the_notebook_table_is_escaped_and_has_headers(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    cards = [make_card("alpha", 8).model_copy(update={"source": evil, "license": evil})]
    make_store(tmp_path / "a<b>&c", 600, cards)
    store = FeatureStore.open(tmp_path / "a<b>&c")
    cells = _Cells()
    cells.feed(store._repr_html_())
    assert set(cells.tags) == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    assert cells.scopes == ["col"] * 8 + ["row"]
    assert cells.texts.count(evil) == 2
    assert cells.texts[0] == f"mmkd store {store.root}: 600 rows in 3 shards of 256"
    assert cells.texts[-8:-2] == ["alpha", "8", "float16", "3 of 3", "600", "600"]
    assert "1 teacher, 3/3 shards extracted" in repr(store)


def test_the_notebook_table_of_a_store_without_teachers(tmp_path: Path) -> None:
    make_store(tmp_path / "s", 3, [])
    assert "no teachers yet" in FeatureStore.open(tmp_path / "s")._repr_html_()
