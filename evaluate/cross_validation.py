"""Tasks on bags: who is trained on, who is tested, and one answer for every bag."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.bags import Bags
from mmkd.evaluate.folds import draw_folds, read_folds
from mmkd.evaluate.splits import hold_out
from mmkd.store import UserError

Part = NDArray[np.int64]


@dataclass(frozen=True)
class Round:
    """One training: indices of bags to train on, to stop or choose by, and to answer for. All have features."""

    number: int
    train: Part
    val: Part
    test: Part

    @property
    def seen(self) -> Part:
        """Training and validation bags, for heads that choose by cross-validation of their own."""
        return np.sort(np.concatenate([self.train, self.val]))


def rounds(
    fold: NDArray[np.int64], there: NDArray[np.bool_], even: NDArray[np.int64], group: NDArray[np.object_], seed: int
) -> Iterator[Round]:
    """A round for each fold; a fifth of the other bags, whole groups at a time, is held out to stop by.

    Args:
        fold: int64 (n,), the round that tests a bag; -1 for bags that are only ever trained on.
        there: bool (n,), bags that have features.
        even: int64 (n,), what the held-out part has about evenly: classes or events.
        group: str (n,), patients.
        seed: of the held-out part.

    Raises:
        UserError: a round without anything to train on.
    """
    for number in np.unique(fold[fold >= 0]).tolist():
        seen = np.flatnonzero((fold != number) & there)
        if len(seen) < 2:
            raise UserError(f"fold {number} leaves {len(seen)} bags with features to train on, expected two or more")
        out = hold_out(even[seen], group[seen], seed)
        if not out.any():  # one group a class: the head stops by what it trains on
            yield Round(number, seen, seen, np.flatnonzero((fold == number) & there))
        else:
            yield Round(number, seen[~out], seen[out], np.flatnonzero((fold == number) & there))


def folds_of(bags: Bags, even: NDArray[np.int64], group: NDArray[np.object_], k: int, seed: int) -> NDArray[np.int64]:
    """Published folds where the data set names a column, else k drawn ones: int64 (n,).

    Raises:
        UserError: folds that cannot be drawn or read.
    """
    column = bags.data.spec.fold
    return draw_folds(even, group, k, seed) if column is None else read_folds(bags.column(column), group, column)


def answers(
    n: int, width: int, every_round: Iterator[Round], answer: Callable[[Round], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Scores float64 (n, width) put together from the rounds; NaN for bags that no round tests."""
    score = np.full((n, width), np.nan)
    for one in every_round:
        if len(one.test):
            score[one.test] = answer(one)
    return score
