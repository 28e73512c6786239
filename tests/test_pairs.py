"""The pairs of a run: made a shard at a time, kept with their tokens, mapped afterwards, made again when in doubt."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import forked_ranks, peaceful
from tiny_run import quiet, write_run

from mmkd.base.errors import ConfigError, IncompleteStoreError, StoreError
from mmkd.distill.captions import numbers_of, tokenize_captions
from mmkd.distill.config import load_run
from mmkd.distill.mapped import ArrayWriter, is_intact, map_arrays
from mmkd.distill.pairs import FOLDER, Pairs, PairSource, open_pairs
from mmkd.distill.probe import estimate
from mmkd.distill.teacher_features import unpack_taught
from mmkd.distill.world import World, join_ranks
from mmkd.store import FeatureStore
from mmkd.store.samples import read_part, with_columns, write_part

CPU = World(torch.device("cpu"))


@pytest.fixture
def features(training_scene: Path, tmp_path: Path) -> Path:
    """300 rows, of which 44 lack teacher two; one is not sound."""
    root = tmp_path / "features"
    shutil.copytree(training_scene / "features", root)
    (root / "ledger/00001.two.json").unlink()
    table, _ = read_part(root, 0)
    write_part(root, 0, with_columns(table, {"status": ["ok"] * 7 + ["partial"] + ["ok"] * (len(table) - 8)}))
    return root


class Words:
    """A tokenizer: the number of letters of each word, from `first` on. Counts what it is asked."""

    def __init__(self, first: int = 1) -> None:
        self.first, self.asked = first, 0

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.asked += len(texts)
        rows = [[self.first + len(word) for word in text.split()] for text in texts]
        return torch.tensor([row[:6] + [0] * (6 - len(row)) for row in rows])


def source_of(root: Path, words: Words | None = None, **changes: Any) -> PairSource:
    """Pairs of both teachers."""
    given = {"where": "", "slugs": ("one", "two"), "selection": None} | changes
    return PairSource(FeatureStore.open(root), tokenizer=words or Words(), **given)


def as_lists(pairs: Pairs) -> list[Any]:
    """Everything that training takes from pairs."""
    numbers = np.arange(len(pairs.rows))
    places = [pairs.places[row] for row in pairs.rows.tolist()]
    bits = None if pairs.bits is None else pairs.bits.tolist()
    tokens = pairs.captions.tokens(numbers).tolist()
    return [pairs.rows.tolist(), places, tokens, pairs.groups.tolist(), bits, pairs.counts, pairs.taught, pairs.cut]


def test_pairs_are_the_sound_rows_with_a_teacher_and_what_the_table_says_of_them(features: Path) -> None:
    store = FeatureStore.open(features)
    pairs = open_pairs(features.parent / "run", source_of(features), CPU)
    available = store.available()
    table = {row["row"]: row for row in store.sample_table().to_pylist()}
    wanted = [row for row, sample in table.items() if sample["status"] == "ok" and available[row].any()]
    assert len(wanted) == 299
    assert pairs.rows.tolist() == wanted
    assert pairs.counts == {"pair": 299}
    assert pairs.taught == dict(zip(store.teachers, available[wanted].sum(axis=0).tolist(), strict=True))
    for number, row in enumerate(wanted):
        sample = table[row]
        assert pairs.places[row] == (sample["uri"], sample["offset"], sample["length"])
        assert pairs.captions.tokens(np.array([number])).tolist() == Words()([sample["caption"]]).tolist()
    # Equal numbers where tokens, or images, are equal.
    tokens = [tuple(Words()([table[row]["caption"]])[0].tolist()) for row in wanted]
    images = [table[row]["image_sha256"] or row for row in wanted]
    for column, values in zip(pairs.groups.T.tolist(), (tokens, images), strict=True):
        assert len({*zip(column, values, strict=True)}) == len(set(column)) == len(set(values))
    there = unpack_taught(pairs.bits, 2)  # type: ignore[arg-type]
    assert np.array_equal(there, np.stack([available] * 2, axis=2))


def test_pairs_are_made_once_and_mapped_afterwards(features: Path) -> None:
    out = features.parent / "run"
    first, second = Words(), Words()
    made = as_lists(open_pairs(out, source_of(features, first), CPU))
    assert first.asked > 200
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = open_pairs(out, source_of(features, second), CPU)
    assert as_lists(again) == made
    assert second.asked <= 260  # the probe
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == files
    places = pickle.loads(pickle.dumps(again.places))  # as a worker process is sent it
    assert len(pickle.dumps(again.places)) < 500
    assert places[int(again.rows[7])] == again.places[int(again.rows[7])]


@pytest.mark.parametrize("change", ["where", "tokenizer", "slugs", "cut", "changed", "lost", "no list", "list"])
def test_other_rows_another_tokenizer_or_damaged_files_are_made_anew(features: Path, change: str) -> None:
    out = features.parent / "run"
    source, words = source_of(features), Words()
    before = as_lists(open_pairs(out, source, CPU))
    folder = out / FOLDER / source.digest
    if change == "where":
        source = source_of(features, words, where="row < 100")
    elif change == "tokenizer":
        words = Words(first=2)
        source = source_of(features, words)
    elif change == "slugs":
        source = source_of(features, words, slugs=("two",))
    else:
        source, file = source_of(features, words), folder / "tokens.bin"
        if change in ("no list", "list"):
            file = folder / "arrays.json"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.unlink() if change in ("lost", "no list") else file.write_bytes(data[:-4] if change == "cut" else data)
    found = as_lists(open_pairs(out, source, CPU))
    assert words.asked > 60
    assert (found == before) is (change not in ("where", "tokenizer", "slugs"))
    assert [path.name for path in (out / FOLDER).iterdir()] == [source.digest]  # what is of no use any more is gone
    fresh = open_pairs(features.parent / "other", source, CPU)
    assert found == as_lists(fresh)


def test_a_kill_while_they_are_written_leaves_nothing_that_counts(
    features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = features.parent / "run", source_of(features)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ArrayWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            open_pairs(out, source, CPU)
    assert (out / FOLDER / source.digest / "tokens.bin").stat().st_size > 0
    assert not is_intact(out / FOLDER / source.digest)
    assert len(open_pairs(out, source_of(features), CPU).rows) > 0


def test_pending_rows_and_bad_conditions_are_one_line(features: Path, tmp_path: Path) -> None:
    table, _ = read_part(features, 1)
    write_part(features, 1, with_columns(table, {"status": ["pending"] * len(table)}))
    with pytest.raises(IncompleteStoreError, match="44 of 300 matching rows are not extracted yet"):
        open_pairs(tmp_path / "run", source_of(features), CPU)
    with pytest.raises(ConfigError, match="colour"):
        open_pairs(tmp_path / "run", source_of(features, where="colour = 'red'"), CPU)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot write"):
        open_pairs(tmp_path / "file", source_of(features), CPU)


def opened_by_rank(root: Path, out: Path) -> None:
    """One of several ranks; notes what it was asked and has."""
    with join_ranks(1.0) as world:
        words = Words()
        pairs = open_pairs(out, source_of(root, words), world)
        (out / f"{world.rank}.json").write_text(json.dumps([words.asked, as_lists(pairs)]))


@pytest.mark.integration
def test_the_first_rank_writes_for_all(features: Path) -> None:
    out = features.parent / "run"
    peaceful(forked_ranks(2, opened_by_rank, features, out))
    (asked, first), (none, second) = (json.loads((out / f"{rank}.json").read_text()) for rank in range(2))
    assert (asked > 200, none) == (True, 0)
    assert first == second


@pytest.mark.integration
def test_a_dry_run_keeps_nothing_and_a_resumed_run_makes_nothing(
    training_scene: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_run(write_run(training_scene, "tokens", epochs=1))
    assert estimate(config) is not None
    assert not config.out.exists()
    caplog.set_level(logging.INFO)
    quiet(config)
    assert caplog.text.count("tokenizing") == 1
    files = {path: path.stat().st_mtime_ns for path in (config.out / FOLDER).rglob("*.*")}
    assert len(files) > 5
    quiet(config)
    assert estimate(config) is not None
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert caplog.text.count("tokenizing") == 1


def test_arrays_are_little_endian_files_of_their_parts(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a") as writer:
        for part in (np.arange(3), np.arange(3, 7)):
            writer.append({"x": part.astype(">i4"), "pair": np.stack([part, -part], axis=1)})
        writer.append({"nothing": np.empty((0, 4))})
        writer.finish({"word": [1, "two"]})
    assert (tmp_path / "a/x.bin").read_bytes() == np.arange(7, dtype="<i4").tobytes()
    found, notes = map_arrays(tmp_path / "a")
    assert {name: (array.shape, array.flags.writeable) for name, array in found.items() if len(array)} == {
        "x": ((7,), False),
        "pair": ((7, 2), False),
    }
    assert found["nothing"].shape == (0, 4)
    assert notes == {"word": [1, "two"]}
    assert is_intact(tmp_path / "a")


def test_captions_are_taken_and_numbered_by_their_tokens() -> None:
    captions = tokenize_captions(["a bb", "", "ccc a bb dd e ff gg", "zz a"], Words())
    assert captions.starts.tolist() == [0, 2, 3, 9, 11]
    some = captions.take(np.array([2, 0, 0]))
    assert some.tokens(np.arange(3)).tolist() == captions.tokens(np.array([2, 0, 0])).tolist()
    a, b, c = some.numbers().tolist()
    assert b == c != a
    # BLAKE2b with 8 bytes, as RFC 7693 has it, without its lowest bit.
    assert numbers_of([b"abc"]).tolist() == [int.from_bytes(bytes.fromhex("d8bb14d833d59559"), "little") >> 1]
