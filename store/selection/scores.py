"""Scores of pairs: blocks of rows of all teachers as unit vectors, and one scorer per family, which prepares once and
then scores any block."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError, TeacherMismatchError, UserError
from mmkd.store.array import consecutive
from mmkd.store.layout import TEXT_SOUND, TOWERS, Tower
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import value_codes
from mmkd.store.selection.rule import AgreementScore, CosineScore, PairScore, RankScore, ZeroShotScore

BLOCK_ROWS = 2048
"""Rows per block: with a pool of 256, a block's features and products stay in a core's cache."""

SPAN_ROWS = 1 << 18
"""With nine teachers 19 MB of float64."""

TIE = 1e-5
"""Cosines closer than this are equal: a caption does not lose to its own copy by rounding."""

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]


def unit_rows(store: FeatureStore, slug: str, tower: Tower, rows: slice | Rows, sound: Bools) -> Floats:
    """Return unit features of some rows, float32 (n, D); zero where `sound`, bool (n,), is false."""
    features = store.features(slug, tower)
    picked = consecutive(features, rows) if isinstance(rows, slice) else features[rows]
    values: Floats = np.asarray(picked, dtype=np.float32)
    if not sound.all():
        values = np.where(sound[:, None], values, np.float32(0))
    norms = np.sqrt(np.einsum("nd,nd->n", values, values))
    return np.divide(values, np.where(norms > 0, norms, 1)[:, None], out=values if values.flags.writeable else None)


def column_codes(store: FeatureStore, column: str) -> tuple[list[str], NDArray[np.int32]]:
    """Return the different values of a sample column, and the place of each row's among them, int32 (N,), their number
    for null. Raises UserError if there is no such column."""
    return value_codes(table[column] for table in store.sample_tables([column]))


def row_spans(rows: int) -> Iterator[slice]:
    """Yield all rows, some at a time: what is made of the scores of all rows is made of as many."""
    return (slice(first, first + SPAN_ROWS) for first in range(0, rows, SPAN_ROWS))


@dataclass(frozen=True)
class Columns:
    """The pairs to judge: a store, teachers, and where both features exist, bool (N, T)."""

    store: FeatureStore
    slugs: tuple[str, ...]
    available: Bools


@dataclass
class Block:
    """Rows `rows` of all teachers; features are read once, when a scorer needs them."""

    columns: Columns
    rows: slice
    _unit: dict[tuple[int, Tower], Floats] = field(default_factory=dict)

    @cached_property
    def sound(self) -> Bools:
        return self.columns.available[self.rows]

    def unit(self, teacher: int, tower: Tower) -> Floats:
        """Return unit features of one teacher, float32 (n, D); zero where it has no pair."""
        if (teacher, tower) not in self._unit:
            slug, sound = self.columns.slugs[teacher], self.sound[:, teacher]
            self._unit[teacher, tower] = unit_rows(self.columns.store, slug, tower, self.rows, sound)
        return self._unit[teacher, tower]


def draw_rows(eligible: Rows, count: int, seed: int, what: str) -> Rows:
    """Draw `count` of the eligible rows, int64 (n,): int64 (count,), ascending; a row's random number depends on (seed,
    row) alone, and the smallest win. Raises UserError, which names the purpose `what`, if fewer are eligible."""
    if len(eligible) < count:
        raise UserError(f"{what} needs {count} rows with all features, there are {len(eligible)}; lower `among`")
    numbers = _mix(eligible.astype(np.uint64) ^ _mix(np.array([seed], dtype=np.uint64)))
    return np.sort(eligible[np.argsort(numbers, kind="stable")[:count]])


def _mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply SplitMix64's output function (Steele, Lea, Flood 2014): a bijection that looks random."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def check_teachers(store: FeatureStore, wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the teachers to judge, in the store's order. Raises UserError for an unknown name, for a teacher without
    one of the towers, or if there is none."""
    for slug in wanted:
        store.card(slug)
    slugs = tuple(slug for slug in store.teachers if not wanted or slug in wanted)
    if not slugs:
        raise UserError(f"{store.root} has no teachers; `mmkd extract` adds some")
    for card, tower in ((store.card(slug), tower) for slug in slugs for tower in TOWERS):
        card.tower_arrays(tower)  # a pair has both
    return slugs


Scorer = Callable[[Block], Floats]
"""Scores a block's pairs, float32 (n, T); entries where a teacher has no pair are ignored."""


def cosine_scorer(spec: CosineScore, columns: Columns, seed: int) -> Scorer:
    """Score by the cosine of image and caption, -1 to 1."""

    def score(block: Block) -> Floats:
        towers = ((block.unit(t, "image"), block.unit(t, "text")) for t in range(len(columns.slugs)))
        return np.stack([np.einsum("nd,nd->n", image, text) for image, text in towers], axis=1)

    return score


def rank_scorer(spec: RankScore, columns: Columns, seed: int) -> Scorer:
    """Score by the rank of the true caption and image among random ones, 1 to the pool's size plus one."""
    both: tuple[tuple[Tower, Tower], ...] = (("image", "text"), ("text", "image"))
    queries = [pair for pair in both if spec.direction in ("both", "_to_".join(pair))]
    pools: list[dict[Tower, Floats]] = []
    for t, slug in enumerate(columns.slugs):
        what = f"rank among {spec.among} of teacher {slug}"
        rows = draw_rows(np.flatnonzero(columns.available[:, t]), spec.among, seed, what)
        sound = np.ones(len(rows), dtype=bool)
        pools.append({tower: unit_rows(columns.store, slug, tower, rows, sound) for tower in TOWERS})

    def score(block: Block) -> Floats:
        ranks = np.ones((len(block.sound), len(pools)), dtype=np.float32)
        for t, pool in enumerate(pools):
            true = np.einsum("nd,nd->n", block.unit(t, "image"), block.unit(t, "text"))
            for query, key in queries:
                better = block.unit(t, query) @ pool[key].T > (true + np.float32(TIE))[:, None]
                ranks[:, t] = np.maximum(ranks[:, t], 1 + np.count_nonzero(better, axis=1))
        return ranks

    return score


def agreement_scorer(spec: AgreementScore, columns: Columns, seed: int) -> Scorer:
    """Score by the mean share of nearest neighbors in common with each other teacher, 0 (no other) to 1."""
    if len(columns.slugs) < 2:
        raise UserError(f"agreement needs two teachers or more, there is {columns.slugs[0]}")
    what = f"agreement among {spec.among}"
    rows = draw_rows(np.flatnonzero(columns.available.all(axis=1)), spec.among, seed, what)
    pools = [unit_rows(columns.store, slug, spec.tower, rows, np.ones(len(rows), bool)) for slug in columns.slugs]

    def score(block: Block) -> Floats:
        sound = block.sound
        votes = np.zeros((len(sound), len(rows)), dtype=np.uint8)
        near = []
        here = np.flatnonzero((rows >= block.rows.start) & (rows < block.rows.stop))
        for t, pool in enumerate(pools):
            cosines = block.unit(t, spec.tower) @ pool.T
            cosines[rows[here] - block.rows.start, here] = -np.inf  # a row is not its own neighbor
            # All that reach the k-th value: rows that tie with it are neighbors too, so the sort order does not matter.
            least = np.partition(cosines, -spec.k, axis=1)[:, -spec.k]
            near.append((cosines >= least[:, None]) & sound[:, t, None])
            votes += near[-1]
        others = np.maximum(sound.sum(axis=1) - 1, 1)
        scores = np.zeros(sound.shape, dtype=np.float32)
        for t, mine in enumerate(near):
            # Do not count a teacher's own vote; without others nothing is shared.
            shared = (votes * mine).sum(axis=1, dtype=np.int64) - mine.sum(axis=1)
            scores[:, t] = np.minimum(shared / (spec.k * others), 1)
        return scores

    return score


def zero_shot_scorer(spec: ZeroShotScore, columns: Columns, seed: int) -> Scorer:
    """Score by the rank of the row's label among all labels, 1 when it is nearest, infinite without prompts for it.
    Prompt features come from another store; no model is loaded."""
    prompts = FeatureStore.open(spec.prompts)
    stated = prompts.sample_table([spec.label])[spec.label].to_pylist()
    classes = sorted(set(stated) - {None})
    known_labels, place = column_codes(columns.store, spec.label)
    strangers = [name for name in classes if name not in known_labels]
    if strangers or len(classes) < 2:
        what = f"prompts for {', '.join(strangers)}" if strangers else f"prompts for {len(classes)} labels"
        raise ConfigError(
            f"{spec.prompts} has {what}; two labels or more must have prompts, and all be in column {spec.label!r} "
            f"of the store, which holds {', '.join(sorted(known_labels)) or 'nothing'}"
        )
    number_of = {name: number for number, name in enumerate(classes)}
    truth: Rows = np.array([*(number_of.get(name, -1) for name in known_labels), -1], dtype=np.int64)[place]
    prompt_labels = np.array([number_of.get(name, -1) for name in stated], dtype=np.int64)
    every = [_class_vectors(columns.store, prompts, slug, classes, prompt_labels) for slug in columns.slugs]

    def score(block: Block) -> Floats:
        right_class = truth[block.rows]
        ranks = np.full((len(right_class), len(every)), np.inf, dtype=np.float32)
        known = np.flatnonzero(right_class >= 0)
        for t, vectors in enumerate(every):
            cosines = block.unit(t, "image")[known] @ vectors.T
            right = cosines[np.arange(len(known)), right_class[known]]
            ranks[known, t] = 1 + np.count_nonzero(cosines > (right + np.float32(TIE))[:, None], axis=1)
        return ranks

    return score


def _class_vectors(store: FeatureStore, prompts: FeatureStore, slug: str, classes: list[str], labels: Rows) -> Floats:
    """Return the normalized mean of each label's unit prompts (C, D): Radford et al. 2021, section 3.1.4."""
    if prompts.card(slug).digest != store.card(slug).digest:
        raise TeacherMismatchError(
            f"teacher {slug} has digest {prompts.card(slug).digest} in {prompts.root}, "
            f"{store.card(slug).digest} in {store.root}; extract the prompts with the same weights"
        )
    sound = (prompts.valid(slug) & TEXT_SOUND > 0) & (labels >= 0)
    texts = unit_rows(prompts, slug, "text", slice(None), sound)
    sums = np.zeros((len(classes), texts.shape[1]), dtype=np.float32)
    np.add.at(sums, labels[sound], texts[sound])
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    if not norms.all():
        lost = ", ".join(name for name, norm in zip(classes, norms[:, 0], strict=True) if not norm)
        raise UserError(f"teacher {slug} has no prompt for {lost} in {prompts.root}; finish `mmkd extract` there")
    return np.asarray(sums / norms, dtype=np.float32)


SCORERS: dict[type[PairScore], Callable[[Any, Columns, int], Scorer]] = {
    CosineScore: cosine_scorer,
    RankScore: rank_scorer,
    AgreementScore: agreement_scorer,
    ZeroShotScore: zero_shot_scorer,
}
