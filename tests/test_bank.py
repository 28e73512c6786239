"""The bank: rows by order, each once, a function of (seed, step), the batch's own rows left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkd.distill.config import BankConfig
from mmkd.distill.losses import PairFeatures
from mmkd.distill.teacher_features import TeacherTargets
from mmkd.distill.teacher_side import Bank, Preparation

ROWS = np.arange(10, 60, 2)  # 25 grid rows
CPU = torch.device("cpu")


class Store:
    """Features that say which row they are of; counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def gather(self, rows: np.ndarray) -> tuple[TeacherTargets, ...]:
        self.read.append(len(rows))
        values = torch.tensor(rows, dtype=torch.float16)[:, None]
        there = torch.tensor(rows % 4 == 0)[:, None].expand(-1, 2)
        return TeacherTargets(values, -values, there), TeacherTargets(values, values, torch.ones_like(there))


def bank(store: Store, size: int, refresh: int, seed: int = 0) -> Bank:
    prepare, config = Preparation(("a", "b"), None, to_unit=False), BankConfig(size=size, refresh=refresh)
    return Bank(ROWS, ROWS % 7, store.gather, prepare, config=config, seed=seed, device=CPU)


def standing(pairs: PairFeatures) -> list[int]:
    return [int(value) for value in pairs.image[:, 0].tolist()]


NONE = torch.tensor([], dtype=torch.int64)


def test_every_step_replaces_rows_by_order_and_no_row_stands_twice() -> None:
    store = Store()
    kept = bank(store, 8, 3)
    seen: set[int] = set()
    before: set[int] = set()
    for step in range(20):
        a, b = kept.at(step, NONE)
        rows = standing(a)
        assert len(set(rows)) == 8
        assert standing(b) == rows
        assert a.group.tolist() == [row % 7 for row in rows]
        assert a.mask.all(1).tolist() == [row % 4 == 0 for row in rows]
        if before:
            assert len(before & set(rows)) == 5
        before = set(rows)
        seen |= before
    assert seen == set(ROWS.tolist())
    assert store.read == [8] + [3] * 19  # one gather of the fresh rows a step


@pytest.mark.parametrize("step", [0, 4, 17])
def test_what_stands_in_it_is_a_function_of_seed_and_step(step: int) -> None:
    walked = bank(Store(), 8, 3)
    for earlier in range(step + 1):
        rows = sorted(standing(walked.at(earlier, NONE)[0]))
    jumped = bank(Store(), 8, 3)
    assert sorted(standing(jumped.at(step, NONE)[0])) == rows
    back = bank(Store(), 8, 3)
    back.at(40, NONE)
    assert sorted(standing(back.at(step, NONE)[0])) == rows
    assert sorted(standing(bank(Store(), 8, 3, seed=1).at(step, NONE)[0])) != rows


def test_slots_are_the_same_after_a_jump() -> None:
    """Sums over keys are then taken in one order, so that a resumed run is equal to the bit."""
    walked, jumped = bank(Store(), 8, 3), bank(Store(), 8, 3)
    for step in range(12):
        last = standing(walked.at(step, NONE)[0])
    assert standing(jumped.at(11, NONE)[0]) == last


def test_a_bank_as_large_as_the_data_is_read_once() -> None:
    store = Store()
    kept = bank(store, 1000, 3)
    for step in range(5):
        assert sorted(standing(kept.at(step, NONE)[0])) == ROWS.tolist()
    assert store.read == [25]


def test_rows_of_the_batch_are_not_available() -> None:
    kept = bank(Store(), 25, 0)
    a, b = kept.at(0, torch.tensor([12, 16, 999]))
    assert {row for row, free in zip(standing(b), b.mask.any(1).tolist(), strict=True) if not free} == {12, 16}
    assert {row for row, free in zip(standing(a), a.mask.all(1).tolist(), strict=True) if free} == {
        row for row in ROWS.tolist() if row % 4 == 0 and row not in (12, 16)
    }
