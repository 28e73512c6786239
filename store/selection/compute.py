"""Compute a selection from a rule: scores in one pass over the memory map, then verdicts, then counts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mmkd.base.errors import IncompleteStoreError, UserError
from mmkd.base.process import usable_cores
from mmkd.store.layout import PAIR_SOUND
from mmkd.store.reader import FeatureStore
from mmkd.store.record import Store
from mmkd.store.selection.block import BLOCK_ROWS, Block, Bools, Columns, Floats, check_teachers
from mmkd.store.selection.counts import Example, SelectionCounts, count, examples
from mmkd.store.selection.rule import PairScore, SelectionRule
from mmkd.store.selection.scorers import SCORERS
from mmkd.store.selection.verdict import Judge, Line, scores_of
from mmkd.store.selections import SelectionCard, check_name, digest_of, write_selection

Progress = Callable[[int, int], None]
"""Called with blocks done and the total number of blocks."""

EXAMPLES = 3
"""Pairs shown on each side of a line."""


@dataclass(frozen=True)
class SelectionReport:
    """Result of `mmkd select`; the selection's attributes hold all of it but the warnings."""

    name: str
    counts: SelectionCounts
    thresholds: dict[str, dict[str, float | None]]
    """Each line of the rule: teacher to threshold; None where it is infinite and divides nothing."""
    examples: dict[str, list[Example]]
    """Each line of the rule: pairs just above and just below it."""
    digest: str
    warnings: tuple[str, ...]


def select(
    store: FeatureStore, name: str, rule: SelectionRule, by: str = "modality", progress: Progress | None = None
) -> SelectionReport:
    """Judge every pair of a store by a rule and write `selections/<name>`. Memory is four bytes per pair and score of
    the rule, plus some blocks of features; it does not grow with the features' width. The result does not depend on the
    number of threads or the order in which blocks are done. Raises UserError if the name is taken; the rule keeps
    nothing; a teacher, column, label or prompt is missing. Raises IncompleteStoreError if a teacher is missing in some
    shards. Raises TeacherMismatchError if prompts were made with other weights."""
    root = check_name(store.root, name)
    columns = pairs_to_judge(store, rule)
    count(columns, columns.available, by)  # a missing column is reported before the long part
    kept, lines = judge(columns, rule, progress)
    counts = count(columns, kept, by)
    if not counts.pairs.kept:
        raise UserError(_explain_empty(columns, lines))
    warnings = []
    if counts.pairs.kept == counts.pairs.available:
        warnings.append("the rule keeps every available pair: training with it is training without a selection")
    thresholds = {line.rule: dict(zip(columns.slugs, line.finite_thresholds(), strict=True)) for line in lines}
    near = {line.rule: examples(store, columns.slugs, line, EXAMPLES) for line in lines}
    card = SelectionCard(
        rule=rule.model_dump(mode="json", by_alias=True, exclude_none=True),
        teachers={slug: store.card(slug).digest for slug in columns.slugs},
        rows=len(store),
        counts=counts.model_dump(mode="json"),
        thresholds=thresholds,
        examples={name: [one.model_dump(mode="json") for one in found] for name, found in near.items()},
        digest=digest_of(kept),
    )
    write_selection(Store(root, store.record), name, kept, card)
    return SelectionReport(name, counts, thresholds, near, card.digest, tuple(warnings))


def pairs_to_judge(store: FeatureStore, rule: SelectionRule) -> Columns:
    """Return the teachers a rule judges, and where they have both features. Raises UserError for a teacher that the
    store does not have. Raises IncompleteStoreError if a teacher is missing in some shards."""
    slugs = check_teachers(store, rule.teachers)
    for slug in slugs:
        missing = [shard for shard in range(store.shards) if (shard, slug) not in store.ledger]
        if missing:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise IncompleteStoreError(
                f"teacher {slug} is missing in {len(missing)} of {store.shards} shards ({named}); finish "
                "`mmkd extract`, or leave it out with `teachers:` in the rule"
            )
    available = np.stack([store.valid(slug) & PAIR_SOUND == PAIR_SOUND for slug in slugs], axis=1)
    return Columns(store, slugs, available)


def judge(columns: Columns, rule: SelectionRule, progress: Progress | None = None) -> tuple[Bools, list[Line]]:
    """Return the pairs a rule keeps, bool (N, T), and its thresholds."""
    specs = list(dict.fromkeys(scores_of(rule.keep)))
    decide = Judge(columns, compute_scores(columns, specs, rule.seed, progress))
    kept = decide.apply(rule.keep)
    return kept, decide.lines


def compute_scores(
    columns: Columns, specs: list[PairScore], seed: int, progress: Progress | None = None, threads: int | None = None
) -> dict[PairScore, Floats]:
    """Compute each score of every pair, float32 (N, T), NaN where a teacher has no pair; features are read once."""
    scorers = {spec: SCORERS[type(spec)](spec, columns, seed) for spec in specs}
    rows = len(columns.store)
    out = {spec: np.full(columns.available.shape, np.nan, dtype=np.float32) for spec in specs}
    starts = range(0, rows if specs else 0, BLOCK_ROWS)

    def work(start: int) -> None:
        block = Block(columns, slice(start, min(start + BLOCK_ROWS, rows)))
        for spec, scorer in scorers.items():
            out[spec][block.rows] = np.where(block.sound, scorer.score(block), np.nan)

    # Threads, not processes: NumPy releases the interpreter lock in products, sorts and casts, and the map is shared.
    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        for done, _ in enumerate(pool.map(work, starts), start=1):
            if progress:
                progress(done, len(starts))
    return out


def _explain_empty(columns: Columns, lines: list[Line]) -> str:
    """Count the pairs that each part of a rule would keep alone."""
    alone = "; ".join(f"{line.rule} alone keeps {int(line.passed().sum()):,}" for line in lines)
    return (
        f"the rule keeps none of {int(columns.available.sum()):,} pairs, so nothing was written"
        f"{': ' + alone if alone else ''}; loosen it"
    )
