"""Orders that are computed: permutations of any range, functions of seed, epoch and position alone."""

from __future__ import annotations

from math import isqrt

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmkd.distill.order import epoch_places, permute

MASK = 2**64 - 1


def mixed(z: int) -> int:
    """SplitMix64's output function in whole numbers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def brought_back(place: int, count: int, key: tuple[int, ...]) -> int:
    """The inverse of `permute`, in whole numbers: the rounds backwards."""
    base = isqrt(count - 1) + 1
    keys = [int(word) for word in np.random.SeedSequence(key).generate_state(8, np.uint64)]
    while True:
        left, right = divmod(place, base)
        for word in reversed(keys):
            left, right = (right - mixed(left ^ word) % base) % base, left
        place = left * base + right
        if place < count:
            return place


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(count: int, seed: int, epoch: int) -> None:
    places = np.arange(count)
    order = epoch_places(places, count, seed, epoch)
    assert sorted(order.tolist()) == places.tolist()
    assert np.array_equal(order, epoch_places(places, count, seed, epoch))
    # A position needs no other.
    assert epoch_places(places[count // 2 :][:3], count, seed, epoch).tolist() == order[count // 2 :][:3].tolist()


@given(st.integers(2, 2**40), st.integers(0, 2**63 - 1), st.data())
def test_each_place_goes_back_to_where_it_came_from(count: int, seed: int, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, count - 1))
    moved = int(permute(np.array([place]), count, seed, 5)[0])
    assert 0 <= moved < count
    assert brought_back(moved, count, (seed, 5)) == place


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_places(np.arange(100), 100, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_every_place_is_as_likely_at_every_position_and_neighbours_do_not_stay_together() -> None:
    count, epochs = 13, 4000
    orders = np.stack([epoch_places(np.arange(count), count, 3, epoch) for epoch in range(epochs)])
    seen = np.stack([np.bincount(orders[:, position], minlength=count) for position in range(count)])
    expected = epochs / count
    # Chi-squared with 144 degrees of freedom is below 216 in 99.99 % of fair draws.
    assert ((seen - expected) ** 2 / expected).sum() < 216
    steps = np.diff(orders, axis=1) % count
    share = (steps == 1).mean()
    assert abs(share - 1 / 13) < 0.01
