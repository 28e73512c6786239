"""What gives way first when a store grows: maps of a process, tokens of millions of captions, lists of neighbours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_run import quiet, write_run

from mmkd.base.errors import UserError
from mmkd.distill import pairs as module
from mmkd.distill.config import load_run
from mmkd.distill.pairs import FILE, Captions, load_tokens, save_tokens
from mmkd.distill.probe import estimate
from mmkd.store.array import ChunkedArray
from mmkd.store.chunk import Run, encode_chunk
from mmkd.store.encoding import ArraySpec
from mmkd.store.inspect.agreement import nearest

MAPS = Path("/proc/sys/vm/max_map_count")


@pytest.mark.skipif(not MAPS.is_file(), reason="only Linux tells how many maps a process may have")
@pytest.mark.skipif(MAPS.is_file() and int(MAPS.read_text()) > 100_000, reason="this system allows very many maps")
def test_more_shards_than_the_system_maps_is_said_in_a_line(tmp_path: Path) -> None:
    size = 16 * 64 * 4
    data, _ = encode_chunk(np.ones((16, 64), dtype=np.float32))
    (tmp_path / "c").write_bytes(data)
    stored = SimpleNamespace(root=tmp_path, spec=ArraySpec("image", "float32", 64), per_shard=16, chunk_bytes=size)
    stored.runs = lambda wanted: (Run(tmp_path / "c", 0, 1, size + 4) for _ in wanted)  # all loose, one file
    allowed = int(MAPS.read_text())

    def array(shards: int) -> ChunkedArray:
        return ChunkedArray(stored, 16 * shards, ("checksum",) * shards)  # type: ignore[arg-type]

    with pytest.raises(
        UserError, match=rf"map 65,\d+ more chunks \(vm.max_map_count is {allowed}\); pack them.*sysctl"
    ):
        array(allowed + 10).open()
    # What was mapped before the refusal is let go: the same process opens what fits.
    few = array(1000).open()
    assert np.asarray(few[15_999]).tolist() == [1.0] * 64


def test_neighbour_lists_do_not_hold_the_table_they_come_from() -> None:
    values = np.eye(50, dtype=np.float32)
    assert nearest(values, 5).base is None


class Words:
    """A tokenizer: the number of letters of each word, from `first` on. Counts what it is asked."""

    def __init__(self, first: int = 1) -> None:
        self.first, self.asked = first, 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.asked += len(texts)
        rows = [[self.first + len(word) for word in text.split()] for text in texts]
        return torch.tensor([row[:6] + [0] * (6 - len(row)) for row in rows])


@pytest.fixture
def captions(monkeypatch: pytest.MonkeyPatch) -> pa.Array:
    monkeypatch.setattr(module, "WORTH_KEEPING", 1000)
    return pa.array([f"lung {'x' * (number % 40)} {number}" for number in range(1000)], pa.large_string())


def same(one: Captions, other: Captions) -> bool:
    return (
        np.array_equal(one.values, other.values)
        and np.array_equal(one.starts, other.starts)
        and (one.pad, one.context) == (other.pad, other.context)
    )


def test_tokens_are_made_once_and_read_afterwards(tmp_path: Path, captions: pa.Array) -> None:
    first, second = Words(), Words()
    made = load_tokens(tmp_path / "run", captions, first)
    save_tokens(tmp_path / "run", captions, made)
    found = load_tokens(tmp_path / "run", captions, second)
    assert first.asked >= len(captions)
    assert second.asked < 300  # the probe
    assert same(made, found)
    assert found.tokens(np.array([3, 999])).tolist() == Words()(captions.take([3, 999]).to_pylist()).tolist()


def test_other_captions_another_tokenizer_or_a_torn_file_are_tokenised_anew(tmp_path: Path, captions: pa.Array) -> None:
    save_tokens(tmp_path, captions, module.tokenize_captions(captions, Words()))
    texts = captions.to_pylist()
    changed = pa.array([*texts[:500], "another caption", *texts[501:]], pa.large_string())
    assert same(load_tokens(tmp_path, changed, Words()), module.tokenize_captions(changed, Words()))
    other = load_tokens(tmp_path, captions, Words(first=2))
    assert other.tokens(np.array([0])).tolist() == Words(first=2)([texts[0]]).tolist()
    whole = (tmp_path / FILE).read_bytes()
    for torn in (whole[: len(whole) // 2], b"", bytes([*whole[:2000], whole[2000] ^ 1, *whole[2001:]])):
        (tmp_path / FILE).write_bytes(torn)
        asked = Words()
        load_tokens(tmp_path, captions, asked)
        assert asked.asked >= len(captions)


def test_small_runs_keep_nothing_and_reading_writes_nothing(tmp_path: Path, captions: pa.Array) -> None:
    load_tokens(tmp_path, captions, Words())
    save_tokens(tmp_path, captions[:999], module.tokenize_captions(captions[:999], Words()))
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_its_tokens_when_it_begins_and_a_dry_run_keeps_nothing(
    training_scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH_KEEPING", 2)
    path = write_run(training_scene, "tokens", epochs=1)
    config = load_run(path)
    assert estimate(config) is not None
    assert not config.out.exists()
    quiet(config)
    written = (config.out / FILE).stat()
    quiet(config)  # resumed: the tokens are read, and not written again
    assert (config.out / FILE).stat().st_mtime_ns == written.st_mtime_ns
