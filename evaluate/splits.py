"""Dividing training rows: a share of the labels, and a held-out part that shares no group with the rest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HELD_OUT_SHARE = 0.2


def draw_share(y: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Draw a share of the rows of every class, at least one of each.

    Args:
        y: int64 (n,), class of every row.
        share: within (0, 1]; 1 gives every row.
        seed: of the draw.

    Returns:
        int64 (m,), ascending positions.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(y):
        members = np.flatnonzero(y == label)
        wanted = max(1, round(share * len(members)))
        drawn.append(rng.permutation(members)[:wanted])
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, dtype=np.int64)


def hold_out(y: NDArray[np.int64], group: NDArray[np.object_], seed: int) -> NDArray[np.bool_]:
    """Choose whole groups so that about a fifth of every class is held out and every class stays in training.

    Rarest class first, groups in random order. A class that only one group has is not held out; nothing is
    held out when that is so of all classes.

    Args:
        y: int64 (n,), class of every row.
        group: str (n,).
        seed: of the order.

    Returns:
        bool (n,), true where held out.
    """
    names, member = np.unique(group.astype(str), return_inverse=True)
    classes = np.unique(y)
    rows = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(rows, (member, np.searchsorted(classes, y)), 1)
    left = rows.sum(axis=0)
    wanted = np.maximum(1, np.round(HELD_OUT_SHARE * left)).astype(np.int64)
    held = np.zeros_like(left)
    out = np.zeros(len(names), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(names))
    for column in np.argsort(left, kind="stable"):
        for candidate in order[(rows[order, column] > 0) & ~out[order]]:
            if held[column] >= wanted[column]:
                break
            keeps_every_class = bool(((left - held - rows[candidate] > 0) | (rows[candidate] == 0)).all())
            if keeps_every_class:
                out[candidate] = True
                held += rows[candidate]
    return out[member]


def shared_groups(one: NDArray[np.object_], other: NDArray[np.object_]) -> list[str]:
    """Groups that occur on both sides of a split, sorted; a sound split has none."""
    return sorted(set(one.tolist()) & set(other.tolist()))
