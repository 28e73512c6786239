"""Rows that are on a disk and not in memory: asked for together, and only those that a step learns from."""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import make_card, make_store

from mmkd.distill import teacher_features
from mmkd.distill.policies import drawn_teacher
from mmkd.distill.teacher_features import TeacherFeatures
from mmkd.store import FeatureStore, chunk
from mmkd.store.chunk import Run, _is_resident, _libc, ask_for_rows, map_runs, read_ahead


def forget(path: Path) -> None:
    """Drop a file's pages from memory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def resident(array: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> float:
    """Share of these rows whose pages are in memory."""
    address, size, libc = array.__array_interface__["data"][0], array.strides[0], _libc()
    starts = [(address + row * size) // 4096 * 4096 for row in rows.tolist()]
    return float(np.mean([_is_resident(libc, start, 4096) for start in starts]))


@pytest.mark.skipif(sys.platform != "linux", reason="process_madvise is Linux's")
def test_rows_that_are_asked_for_come_into_memory_and_others_do_not(tmp_path: Path) -> None:
    rows = 16_384
    (tmp_path / "f").write_bytes(np.random.default_rng(0).bytes(rows * 4096))
    values = map_runs([Run(tmp_path / "f", 0, 1)], 1, rows * 4096, bytes, read_around=False).reshape(rows, 4096)
    forget(tmp_path / "f")
    everything = np.arange(rows)
    if resident(values, everything) > 0.01:
        pytest.skip("this disk keeps its pages in memory")
    wanted = np.random.default_rng(1).permutation(rows)[:3000]
    assert ask_for_rows(values.__array_interface__["data"][0], values.strides[0], wanted) == 3000
    ended = time.monotonic() + 20
    while resident(values, wanted) < 1 and time.monotonic() < ended:
        time.sleep(0.05)
    if not resident(values, wanted):
        pytest.skip("this system takes no advice")
    assert resident(values, wanted) == 1
    assert resident(values, np.setdiff1d(everything, wanted)) < 0.01
    # Most of a part: all pages between its first and its last row are read in order.
    part = 8192 + np.random.default_rng(2).permutation(4096)[:2500]
    forget(tmp_path / "f")
    ask_for_rows(values.__array_interface__["data"][0], values.strides[0], part)
    between, ended = np.arange(part.min(), part.max() + 1), time.monotonic() + 20
    while resident(values, between) < 1 and time.monotonic() < ended:
        time.sleep(0.05)
    assert resident(values, between) == 1
    assert resident(values, np.arange(4096)) < 0.01
    wanted = part
    # A slice: more than the kernel reads of one piece of advice.
    read_ahead(values[:4096].reshape(-1))
    ended = time.monotonic() + 20
    while resident(values, np.arange(4096)) < 1 and time.monotonic() < ended:
        time.sleep(0.05)
    assert resident(values, np.arange(4096)) == 1
    # What is there is not asked for.
    assert ask_for_rows(values.__array_interface__["data"][0], values.strides[0], wanted) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="process_madvise is Linux's")
def test_systems_that_refuse_or_hide_what_is_in_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.frombuffer(mmap.mmap(-1, 1 << 20), dtype=np.uint8).reshape(256, 4096)
    place, rows = values.__array_interface__["data"][0], np.arange(9)
    values[rows].sum()
    monkeypatch.setattr(chunk, "_is_resident", lambda *_: True)  # as of a file that the user may not write
    assert [ask_for_rows(place, 4096, rows, look) for look in (True, False)] == [0, 9]

    def refuse(_: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert ask_for_rows(place, 4096, rows, look=False) == 0


def test_rows_of_every_teacher_are_asked_for_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s", 600, [make_card("alpha", 8), make_card("beta", 16)])
    store, asked = FeatureStore.open(tmp_path / "s"), []
    monkeypatch.setattr(
        teacher_features,
        "ask_for_rows",
        lambda place, size, rows, look: asked.append((place, size, rows.tolist(), look)),
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    rows = np.array([512, 3, 77])
    TeacherFeatures(store, ("alpha", "beta")).gather(rows, torch.tensor([[True, False], [False, True], [True, True]]))
    parts = [(store.features(slug, tower), mine) for slug, mine in (("alpha", [512, 77]), ("beta", [3, 77]))
             for tower in ("image", "text")]  # fmt: skip
    assert asked == [(p.__array_interface__["data"][0], p.strides[0], mine, False) for p, mine in parts]


def test_features_that_are_not_wanted_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_store(tmp_path / "s", 600, [make_card("alpha", 8), make_card("beta", 16), make_card("gamma", 24)])
    store = FeatureStore.open(tmp_path / "s")
    slugs = ("alpha", "beta", "gamma")
    features = TeacherFeatures(store, slugs)
    rows = np.random.default_rng(0).permutation(600)[:90]
    whole = features.gather(rows)
    wanted = drawn_teacher(3, 1, torch.arange(90), torch.ones(90, 3, dtype=torch.bool)) > 0
    assert wanted.sum(1).tolist() == [1] * 90
    read: list[int] = []
    select = torch.index_select

    def counted(source: torch.Tensor, dim: int, index: torch.Tensor, **out: Any) -> torch.Tensor:
        read.append(len(index))
        return select(source, dim, index, **out)

    monkeypatch.setattr(torch, "index_select", counted)
    some = features.gather(rows, wanted)
    assert sum(read) == 2 * 90
    for found, every, mine in zip(some, whole, wanted.T, strict=True):
        assert torch.equal(found.present, every.present)
        for tower in ("image", "text"):
            assert torch.equal(getattr(found, tower)[mine], getattr(every, tower)[mine])
            assert not getattr(found, tower)[~mine].any()
