"""Orders of an epoch's pairs, computed and never stored: functions of seed, epoch and position, so that a rank computes
the few places that it needs. Both leave no pair out and take none twice."""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
"""Four make a Feistel network a strong pseudorandom permutation of a large range (Luby and Rackoff 1988); more serve
small ones."""


def permute(places: NDArray[np.int64], count: int, *key: int) -> NDArray[np.int64]:
    """Return where a permutation of 0 ... count-1 takes each of `places`, int64 (n,); `key`: numbers from 0 on that
    name the permutation. A Feistel network over the digits of a number to the base of sqrt(count), walked along its
    cycle until it is below `count` (Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9, "generalized Feistel")."""
    if count < 2:
        return places.copy()
    base = np.uint64(isqrt(count - 1) + 1)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def network(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers // base, numbers % base
        for round_key in keys:
            left, right = right, (left + _mix(right ^ round_key) % base) % base
        return left * base + right

    moved = network(places.astype(np.uint64))
    while len(outside := np.flatnonzero(moved >= np.uint64(count))):
        moved[outside] = network(moved[outside])
    return moved.astype(np.int64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's output function (doi:10.1145/2660193.2660195); products wrap."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def epoch_places(positions: NDArray[np.int64], count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the places, among `count` pairs, at these positions of an epoch's random order, int64 (n,): a batch
    depends on no property of its rows."""
    return permute(positions, count, seed, epoch)


class Windows:
    """Orders for a store whose rows cannot be read at random: an epoch takes the shards in random order, `together` at
    a time, and shuffles the pairs of these: its windows. rows: int64 (n,), ascending."""

    def __init__(self, rows: NDArray[np.int64], per_shard: int, together: int, seed: int) -> None:
        shards = np.arange(rows[0] // per_shard, rows[-1] // per_shard + 1)
        starts = np.searchsorted(rows, shards * per_shard)
        sizes = np.diff([*starts, len(rows)])
        self.shards, self.starts, self.sizes = (part[sizes > 0] for part in (shards, starts, sizes))
        self.together, self.seed = together, seed
        self._last: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which shard comes when, and at which position of the epoch each begins, with the end."""
        last = self._last  # another thread may ask for another epoch
        if last is None or last[0] != epoch:
            order = permute(np.arange(len(self.shards)), len(self.shards), self.seed, epoch, 0)
            self._last = last = epoch, order, np.concatenate([[0], self.sizes[order].cumsum()])
        return last[1:]

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def of_epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the shards of each window."""
        order, _ = self._epoch(epoch)
        return [self.shards[order[first : first + self.together]] for first in range(0, len(order), self.together)]

    def inside(self, shards: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the places of the pairs of some of the shards, int64 (n,), ascending."""
        some = np.searchsorted(self.shards, np.sort(shards))
        parts = zip(self.starts[some].tolist(), self.sizes[some].tolist(), strict=True)
        return np.concatenate([np.arange(start, start + size) for start, size in parts])

    def window(self, epoch: int, position: int) -> tuple[int, int, NDArray[np.int64]]:
        """Return number, end and shards of the window that a position lies in."""
        order, begins = self._epoch(epoch)
        number = (int(np.searchsorted(begins, position, side="right")) - 1) // self.together
        first, last = number * self.together, min((number + 1) * self.together, len(order))
        return number, int(begins[last]), self.shards[order[first:last]]

    def places(self, positions: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Return the places among the pairs at these positions of an epoch, int64 (n,)."""
        order, begins = self._epoch(epoch)
        edges = np.append(begins[: -1 : self.together], begins[-1])
        window_of = np.searchsorted(edges, positions, side="right") - 1
        found = np.empty_like(positions)
        for window in np.unique(window_of).tolist():
            here, first = window_of == window, int(edges[window])
            size = int(edges[window + 1]) - first
            moved = first + permute(positions[here] - first, size, self.seed, epoch, 1 + window)
            turn = np.searchsorted(begins, moved, side="right") - 1
            found[here] = self.starts[order[turn]] + moved - begins[turn]
        return found
