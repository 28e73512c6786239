"""Parts of the rows: shares of labels, held-out groups, cross-validation by patients with scores fold by fold, and
subgroups: the values of a column, or the ranges between cuts of a number."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from mmkd.base.arrays import Bools, Floats, Ints, Objects
from mmkd.base.errors import UserError
from mmkd.base.text import counted
from mmkd.evaluate.dataset import DatasetRows, Split
from mmkd.evaluate.features import Bags
from mmkd.evaluate.metrics import mean_of_defined
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import BootstrapSettings, Score, group_counts, name_words
from mmkd.evaluate.statistics import FEWEST_GROUPS


def draw_share(y: Ints, share: float, seed: int) -> Ints:
    """Draw a share, within (0, 1], of the rows of every class `y`, int64 (n,), at least one of each. Returns ascending
    positions, int64 (m,)."""
    rng = np.random.default_rng(seed)
    drawn = [np.empty(0, dtype=np.int64)]
    for label in np.unique(y):
        members = np.flatnonzero(y == label)
        drawn.append(rng.permutation(members)[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(drawn))


def hold_out(y: Ints, group: Objects, seed: int) -> Bools:
    """Choose whole groups, str (n,), so that about a fifth of every class `y`, int64 (n,), is held out and every class
    stays in training: rarest class first, groups in random order. A class that only one group has is not held out.
    Returns bool (n,)."""
    names, member = np.unique(group.astype(str), return_inverse=True)
    classes = np.unique(y)
    rows = np.zeros((len(names), len(classes)), dtype=np.int64)
    np.add.at(rows, (member, np.searchsorted(classes, y)), 1)
    left = rows.sum(axis=0)
    wanted = np.maximum(1, np.round(0.2 * left)).astype(np.int64)
    held = np.zeros_like(left)
    out = np.zeros(len(names), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(names))
    for column in np.argsort(left, kind="stable"):
        for candidate in order[(rows[order, column] > 0) & ~out[order]]:
            if held[column] >= wanted[column]:
                break
            if ((left - held - rows[candidate] > 0) | (rows[candidate] == 0)).all():  # every class stays
                out[candidate] = True
                held += rows[candidate]
    return out[member]


def shared_groups(one: Objects, other: Objects) -> list[str]:
    return sorted(set(one.tolist()) & set(other.tolist()))


def probe_splits(data: DatasetRows) -> tuple[Split, ...]:
    return ("train", "val", "test") if data.spec.rows.val is not None else ("train", "test")


def group_leaks(data: DatasetRows, splits: tuple[Split, ...]) -> list[str]:
    """Report groups that are in two of these splits: such a score would measure memory."""
    found, what = [], data.spec.group or "key"
    for one, other in combinations((name for name in splits if name in data.splits), 2):
        if shared := shared_groups(data.groups(data.splits[one]), data.groups(data.splits[other])):
            found.append(
                f"{data.spec.dataset}: {len(shared)} values of {what} stand in both {one} and {other}, "
                f"for example {shared[0]!r}; divide the splits by {what}"
            )
    return found


@dataclass(frozen=True)
class Round:
    """One training: indices of bags to train on, to stop or choose by, and to answer for. All have features."""

    number: int
    train: Ints
    val: Ints
    test: Ints

    @property
    def seen(self) -> Ints:
        """Training and validation bags, for heads that choose by cross-validation of their own."""
        return np.sort(np.concatenate([self.train, self.val]))


def rounds(fold: Ints, there: Bools, even: Ints, group: Objects, seed: int) -> Iterator[Round]:
    """Yield a round for each fold; a fifth of the other bags, whole groups at a time, is held out to stop by. `fold`:
    int64 (n,), the round that tests a bag, -1 for none. `there`: bool (n,), bags with features. `even`: int64 (n,),
    classes or events. `group`: str (n,), patients. Raises UserError for a round without anything to train on."""
    for number in np.unique(fold[fold >= 0]).tolist():
        seen, test = np.flatnonzero((fold != number) & there), np.flatnonzero((fold == number) & there)
        if len(seen) < 2:
            raise UserError(f"fold {number} leaves {len(seen)} bags with features to train on, expected two or more")
        out = hold_out(even[seen], group[seen], seed)
        # With one group per class nothing is held out: the head stops by what it trains on.
        yield Round(number, seen[~out], seen[out] if out.any() else seen, test)


def folds_of(bags: Bags, even: Ints, group: Objects, k: int, seed: int) -> Ints:
    """Published folds where the data set names a column, else k drawn ones: int64 (n,), as `read_folds`,
    `draw_folds`."""
    column = bags.data.spec.fold
    return draw_folds(even, group, k, seed) if column is None else read_folds(bags.column(column), group, column)


def answers(n: int, width: int, every_round: Iterator[Round], answer: Callable[[Round], Floats]) -> Floats:
    """Return scores float64 (n, width) put together from the rounds; NaN for bags that no round tests."""
    score = np.full((n, width), np.nan)
    for one in every_round:
        if len(one.test):
            score[one.test] = answer(one)
    return score


def draw_folds(y: Ints, group: Objects, k: int, seed: int) -> Ints:
    """Divide samples into k folds, int64 (n,), whole groups, str (n,), at a time, classes or events `y`, int64 (n,),
    about evenly. Raises UserError for fewer groups than folds."""
    groups = len(set(group.tolist()))
    if groups < k:
        raise UserError(f"{groups} patients cannot fill {k} folds; set folds to {max(groups, 2)} or less")
    fold = np.empty(len(y), dtype=np.int64)
    splitter = StratifiedGroupKFold(k, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # A class rarer than k is spread as far as it goes; a fold without it has no value and says so.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        # scikit-learn refuses if every class is rarer than k; nothing can be spread evenly then.
        even = y if np.bincount(y).max() >= k else np.zeros_like(y)
        for number, (_, test) in enumerate(splitter.split(np.zeros(len(y)), even, group.astype(str))):
            fold[test] = number
    return fold


def read_folds(values: Objects, group: Objects, column: str) -> Ints:
    """Return published folds by their column, int64 (n,), numbered in the order of their sorted names. Raises UserError
    for a sample without a fold, a group in two folds, or only one fold."""
    if missing := sum(value is None for value in values):
        raise UserError(f"column {column!r} names no fold for {missing} samples; leave them out or name their fold")
    names, fold = np.unique(values.astype(str), return_inverse=True)
    if len(names) < 2:
        raise UserError(f"column {column!r} names {len(names)} fold, expected two or more")
    first: dict[str, str] = {}
    for one, name in sorted(zip(group.tolist(), values.tolist(), strict=True)):
        if first.setdefault(one, name) != name:
            raise UserError(f"{one!r} stands in folds {first[one]} and {name} of {column!r}")
    return fold.astype(np.int64)


def mean_over_folds(metric: Score) -> Score:
    """Return the mean of a metric over the folds where it has a value. Scores of two folds come from two models and are
    not on one scale, so they are never ranked together."""

    def of_predictions(predictions: Predictions, weights: Floats) -> Floats:
        values = [metric(predictions.take(mask), weights[:, mask]) for mask in predictions.fold_masks()]
        return mean_of_defined(np.stack(values, axis=1))

    return of_predictions


def folded_resamples(predictions: Predictions, settings: BootstrapSettings, name: str) -> Iterator[Floats]:
    """Yield counts, float64 (settings.n, n), of groups resampled inside each fold. The draws depend on the seed,
    `name`, the folds and the groups only, as in `clustered_resamples`."""
    counts = np.zeros((settings.n, len(predictions)))
    fold = np.zeros(len(predictions), dtype=np.int64) if predictions.fold is None else predictions.fold
    for number in np.unique(fold).tolist():
        mask = fold == number
        _, member = np.unique(predictions.group[mask].astype(str), return_inverse=True)
        seed = [settings.seed, number, *name_words(name)]
        counts[:, mask] = np.concatenate(list(group_counts(member.astype(np.int64), settings.n, seed)))
    yield counts


def subgroups_of(data: DatasetRows, column_of: Callable[[str], Objects]) -> dict[str, Objects]:
    """Return the subgroup of every sample, str (n,), `""` for none, by the columns of `measures: subgroups`.
    `column_of` gives a column, str or None (n,). Raises UserError for a value that cannot be cut."""
    found = {}
    for name, cuts in data.spec.measures.subgroups.items():
        values = column_of(name)
        found[name] = np.array(
            [_range(data, name, v, cuts) if cuts and v is not None else v or "" for v in values], dtype=object
        )
    return found


def small_subgroups(found: Predictions) -> list[str]:
    """Sentences on subgroups too small for an interval, and on samples that are in none."""
    said = []
    for name, values in found.subgroups.items():
        groups = Counter(value for value, _ in set(zip(values.tolist(), found.group.tolist(), strict=True)))
        blank = int((values == "").sum())
        said += [f"{blank} samples have no {name}: they are in no subgroup"] if blank else []
        said += [
            f"subgroup {name} {value!r} has {counted(n, 'group')}, an interval needs {FEWEST_GROUPS}: it has none, and "
            f"is left out of gap_{name} and worst_{name}"
            for value, n in sorted(groups.items())
            if value and n < FEWEST_GROUPS
        ]
    return said


def _range(data: DatasetRows, name: str, text: str, cuts: tuple[float, ...]) -> str:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{data.spec.dataset}: {name} has {text!r}, not a number to cut at {', '.join(map(str, cuts))}")
    return ranges(cuts)[int(np.searchsorted(cuts, value, side="right"))]


def ranges(cuts: tuple[float, ...]) -> list[str]:
    """Names of the ranges between cuts, ascending."""
    return [f"< {cuts[0]:g}", *(f"{low:g} to < {high:g}" for low, high in pairwise(cuts)), f">= {cuts[-1]:g}"]
