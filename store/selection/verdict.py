"""Verdicts from scores: thresholds, lists, counts, and how rules combine. Pure NumPy over (N, T) arrays."""

import difflib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import ConfigError, UserError, did_you_mean
from mmkd.store.selection.rule import (
    OTHERS,
    CosineRule,
    CosineScore,
    HomeRule,
    PairScore,
    PairsRule,
    Rule,
    TeachersRule,
)
from mmkd.store.selection.scores import Bools, Columns, Floats, column_codes, row_spans

_MARGIN = 0.8
"""Similarity (difflib's ratio) above which an unknown teacher name counts as a typo."""


@dataclass(frozen=True)
class Line:
    """Threshold at which a leaf of the rule divides its pairs."""

    rule: str
    score: Floats
    """float32 (N, T); NaN where a teacher has no pair."""
    threshold: NDArray[np.float64]
    """float64 (T,): the score that a pair must reach, or must not exceed when lower is better."""
    higher: bool

    def passed(self) -> Bools:
        """Return bool (N, T); false where there is no score."""
        passed, compare = np.empty(self.score.shape, dtype=bool), np.greater_equal if self.higher else np.less_equal
        for rows in row_spans(len(passed)):
            compare(self.score[rows], self.threshold, out=passed[rows])
        return passed


def scores_of(rule: Rule) -> Iterator[PairScore]:
    """Yield the settings of every score a rule needs; equal ones are computed once."""
    kind, chosen = rule.kind, rule.chosen
    for base in PairScore.__subclasses__():
        if isinstance(chosen, base):
            yield base(**{name: getattr(chosen, name) for name in base.model_fields})
    if kind == "cosine":
        yield CosineScore()
    if isinstance(chosen, TeachersRule | PairsRule):
        yield chosen.by.chosen
    for child in rule.children():
        yield from scores_of(child)


@dataclass
class Judge:
    """Applies a rule to pairs whose scores are known, and collects its thresholds in `lines`."""

    columns: Columns
    scores: Mapping[PairScore, Floats]
    lines: list[Line] = field(default_factory=list)

    def apply(self, rule: Rule) -> Bools:
        """Return the available pairs the rule keeps, bool (N, T). Raises ConfigError, UserError for what is missing."""
        combine: dict[str, Callable[[Any], Bools]] = {
            "all": lambda rules: reduce(operator.and_, map(self.apply, rules)),
            "any": lambda rules: reduce(operator.or_, map(self.apply, rules)),
            "none": lambda child: ~self.apply(child),
            "where": lambda text: self._where(text)[:, None],
            "home": self._home,
            "teachers": self._teachers,
            "pairs": self._pairs,
        }
        found = combine[rule.kind](rule.chosen) if rule.kind in combine else self._threshold(rule)
        return found & self.columns.available

    def _threshold(self, rule: Rule) -> Bools:
        chosen = rule.chosen
        spec = next(scores_of(rule))
        score = self.scores[spec]
        if isinstance(chosen, CosineRule):
            threshold = self._cosine_threshold(chosen, score)
        else:
            limit = next(getattr(chosen, name) for name in ("at_most", "at_least", "top") if hasattr(chosen, name))
            threshold = [float(limit)] * len(self.columns.slugs)
        what = f"{rule.kind}: {chosen.model_dump(mode='json', exclude_unset=True)}"
        line = Line(what, score, np.array(threshold), spec.higher_is_better)
        self.lines.append(line)
        return line.passed()

    def _cosine_threshold(self, rule: CosineRule, score: Floats) -> list[float]:
        if rule.quantile is not None:  # the lowest score left after dropping a share; ties with it stay
            ordered = [np.sort(score[there, t]) for t, there in enumerate(self.columns.available.T)]
            return [float(scores[int(rule.quantile * len(scores))]) if len(scores) else 0.0 for scores in ordered]
        values, slugs = rule.at_least, self.columns.slugs
        assert values is not None
        if isinstance(values, float):
            return [values] * len(slugs)
        missing = [slug for slug in slugs if slug not in values]
        for name in values:  # a rule may name teachers that this store does not have
            if name in (*slugs, OTHERS):
                continue
            if nearest := difflib.get_close_matches(name, missing, n=1, cutoff=_MARGIN):
                raise ConfigError(f"cosine.at_least: no teacher {name!r} in the store; did you mean {nearest[0]!r}?")
        if missing and OTHERS not in values:
            lost = ", ".join(missing)
            raise ConfigError(f"cosine.at_least has no value for {lost}; add them, or `{OTHERS}` for the rest")
        return [values.get(slug, values.get(OTHERS, 0.0)) for slug in slugs]

    def _where(self, text: str) -> Bools:
        store = self.columns.store
        rows = store.sample_table(["row"], filter=parse_condition(text, store.samples.schema))["row"].to_numpy()
        if not len(rows):
            raise UserError(f"no row of {store.root} fits {text!r}; `mmkd store info {store.root}` shows what it holds")
        mask = np.zeros(len(store), dtype=bool)
        mask[rows] = True
        return mask

    def _home(self, rule: HomeRule) -> Bools:
        store, slugs = self.columns.store, self.columns.slugs
        for slug in rule.teachers:
            store.card(slug)
        values, numbers = column_codes(store, rule.column)
        for slug, named in rule.teachers.items():
            for home in named:
                if home not in values:
                    hint = did_you_mean(home, values, f"it holds {', '.join(values) or 'nothing'}")
                    raise ConfigError(f"home of {slug}: no row of column {rule.column!r} is {home!r}; {hint}")
        # The last place stands for a missing value.
        known = np.full((len(values) + 1, len(slugs)), rule.unlisted == "keep")
        for t, slug in enumerate(slugs):
            if slug in rule.teachers:
                known[:, t] = [*(value in rule.teachers[slug] for value in values), False]
        return np.asarray(known[numbers])

    def _goodness(self, rule: TeachersRule | PairsRule) -> Floats:
        spec = rule.by.chosen
        score = self.scores[spec] if spec.higher_is_better else -self.scores[spec]
        if rule.scale == "raw":
            return score
        shares = np.full_like(score, np.nan)
        for t, there in enumerate(self.columns.available.T):
            ordered = np.sort(score[there, t])
            shares[there, t] = np.searchsorted(ordered, score[there, t], side="right") / max(len(ordered), 1)
        return shares

    def _teachers(self, rule: TeachersRule) -> Bools:
        kept = self.apply(rule.of)
        if rule.at_most is not None:
            good = np.where(kept, self._goodness(rule), -np.inf)
            # Stable: of equal teachers the store's first wins. The second argsort gives each teacher its rank.
            place = np.argsort(np.argsort(-good, axis=1, kind="stable"), axis=1, kind="stable")
            kept = kept & (place < rule.at_most)
        return np.asarray(kept & (kept.sum(axis=1) >= rule.at_least)[:, None])

    def _pairs(self, rule: PairsRule) -> Bools:
        candidates = self.columns.available if rule.of is None else self.apply(rule.of)
        flat = np.flatnonzero(candidates)
        available = int(self.columns.available.sum())
        target = rule.target if rule.target is not None else round((rule.share or 0) * available)
        if not 1 <= target <= len(flat):
            raise UserError(f"pairs: {target:,} are wanted, the rule below leaves {len(flat):,}; change one of the two")
        good = self._goodness(rule)
        order = np.argsort(-good.reshape(-1)[flat], kind="stable")[:target]
        kept = np.zeros(candidates.size, dtype=bool)
        kept[flat[order]] = True
        worst = float(good.reshape(-1)[flat[order[-1]]])
        what = f"pairs: {target:,} by {rule.by.kind} ({rule.scale}), worst kept {worst:.6g}"
        self.lines.append(Line(what, np.where(candidates, good, np.nan), np.full(len(self.columns.slugs), worst), True))
        return kept.reshape(candidates.shape)
