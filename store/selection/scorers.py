"""Scores of pairs, one scorer per family: preparation, and scoring of a block of rows. Stateless."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from mmkd.base.errors import ConfigError, TeacherMismatchError, UserError
from mmkd.store.layout import TEXT_SOUND, TOWERS, Tower
from mmkd.store.reader import FeatureStore
from mmkd.store.selection.block import TIE, Block, Columns, Floats, Rows, draw_rows, unit_rows
from mmkd.store.selection.rule import AgreementScore, CosineScore, PairScore, RankScore, ZeroShotScore


class Scorer(Protocol):
    """Scores of a block's pairs."""

    def score(self, block: Block) -> Floats:
        """Return float32 (n, T); entries where a teacher has no pair are ignored."""


class CosineScorer:
    """Cosine of image and caption."""

    def __init__(self, spec: CosineScore, columns: Columns, seed: int) -> None:
        self.teachers = len(columns.slugs)

    def score(self, block: Block) -> Floats:
        """Return cosines in [-1, 1]."""
        towers = ((block.unit(t, "image"), block.unit(t, "text")) for t in range(self.teachers))
        return np.stack([np.einsum("nd,nd->n", image, text) for image, text in towers], axis=1)


class RankScorer:
    """Rank of the true caption and image among random ones."""

    def __init__(self, spec: RankScore, columns: Columns, seed: int) -> None:
        self.queries: list[tuple[Tower, Tower]] = []
        if spec.direction in ("both", "image_to_text"):
            self.queries.append(("image", "text"))
        if spec.direction in ("both", "text_to_image"):
            self.queries.append(("text", "image"))
        self.pools: list[dict[Tower, Floats]] = []
        for t, slug in enumerate(columns.slugs):
            rows = draw_rows(
                np.flatnonzero(columns.available[:, t]), spec.among, seed, f"rank among {spec.among} of teacher {slug}"
            )
            sound = np.ones(len(rows), dtype=bool)
            self.pools.append({tower: unit_rows(columns.store, slug, tower, rows, sound) for tower in TOWERS})

    def score(self, block: Block) -> Floats:
        """1 when nothing in the pool fits better, at most the pool's size plus one."""
        ranks = np.ones((len(block.sound), len(self.pools)), dtype=np.float32)
        for t, pool in enumerate(self.pools):
            true = np.einsum("nd,nd->n", block.unit(t, "image"), block.unit(t, "text"))
            for query, key in self.queries:
                better = block.unit(t, query) @ pool[key].T > (true + np.float32(TIE))[:, None]
                ranks[:, t] = np.maximum(ranks[:, t], 1 + np.count_nonzero(better, axis=1))
        return ranks


class AgreementScorer:
    """Share of nearest neighbors in common with the other teachers."""

    def __init__(self, spec: AgreementScore, columns: Columns, seed: int) -> None:
        if len(columns.slugs) < 2:
            raise UserError(f"agreement needs two teachers or more, there is {columns.slugs[0]}")
        self.k, self.tower = spec.k, spec.tower
        what = f"agreement among {spec.among}"
        self.rows: Rows = draw_rows(np.flatnonzero(columns.available.all(axis=1)), spec.among, seed, what)
        sound = np.ones(len(self.rows), dtype=bool)
        self.pools = [unit_rows(columns.store, slug, spec.tower, self.rows, sound) for slug in columns.slugs]

    def score(self, block: Block) -> Floats:
        """Return mean share of common neighbors, 0 to 1; 0 where no other teacher has the row."""
        sound = block.sound
        votes = np.zeros((len(sound), len(self.rows)), dtype=np.uint8)
        near = []
        here = np.flatnonzero((self.rows >= block.rows.start) & (self.rows < block.rows.stop))
        for t, pool in enumerate(self.pools):
            cosines = block.unit(t, self.tower) @ pool.T
            cosines[self.rows[here] - block.rows.start, here] = -np.inf  # a row is not its own neighbor
            # All that reach the k-th value: rows that tie with it are neighbors too, so the sort order does not matter.
            least = np.partition(cosines, -self.k, axis=1)[:, -self.k]
            near.append((cosines >= least[:, None]) & sound[:, t, None])
            votes += near[-1]
        others = np.maximum(sound.sum(axis=1) - 1, 1)
        scores = np.zeros(sound.shape, dtype=np.float32)
        for t, mine in enumerate(near):
            # Do not count a teacher's own vote; without others nothing is shared.
            shared = (votes * mine).sum(axis=1, dtype=np.int64) - mine.sum(axis=1)
            scores[:, t] = np.minimum(shared / (self.k * others), 1)
        return scores


class ZeroShotScorer:
    """Rank of the row's label among all labels; prompt features come from another store, no model is loaded."""

    def __init__(self, spec: ZeroShotScore, columns: Columns, seed: int) -> None:
        prompts = FeatureStore.open(spec.prompts)
        table = prompts.sample_table([spec.label])
        self.classes: list[str] = sorted(set(table[spec.label].drop_null().to_pylist()))
        labels = columns.store.sample_table([spec.label])[spec.label]
        _check_classes(self.classes, labels, spec)
        numbers = {name: number for number, name in enumerate(self.classes)}
        encoded = labels.combine_chunks().dictionary_encode()
        table_of = np.array([numbers.get(name, -1) for name in encoded.dictionary.to_pylist()] + [-1], dtype=np.int64)
        self.truth: Rows = table_of[encoded.indices.fill_null(len(table_of) - 1).to_numpy()]
        prompt_labels = np.array([numbers.get(name, -1) for name in table[spec.label].to_pylist()], dtype=np.int64)
        self.vectors = [self._vectors(columns, prompts, slug, prompt_labels) for slug in columns.slugs]

    def _vectors(self, columns: Columns, prompts: FeatureStore, slug: str, labels: Rows) -> Floats:
        """Return normalized mean of each label's unit prompts, float32 (C, D). Radford et al. 2021, section 3.1.4."""
        if prompts.card(slug).digest != columns.store.card(slug).digest:
            raise TeacherMismatchError(
                f"teacher {slug} has digest {prompts.card(slug).digest} in {prompts.root}, "
                f"{columns.store.card(slug).digest} in {columns.store.root}; extract the prompts with the same weights"
            )
        sound = (prompts.valid(slug) & TEXT_SOUND > 0) & (labels >= 0)
        texts = unit_rows(prompts, slug, "text", slice(None), sound)
        sums = np.zeros((len(self.classes), texts.shape[1]), dtype=np.float32)
        np.add.at(sums, labels[sound], texts[sound])
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        if not norms.all():
            lost = ", ".join(name for name, norm in zip(self.classes, norms[:, 0], strict=True) if not norm)
            raise UserError(f"teacher {slug} has no prompt for {lost} in {prompts.root}; finish `mmkd extract` there")
        return np.asarray(sums / norms, dtype=np.float32)

    def score(self, block: Block) -> Floats:
        """1 when the right label is nearest; infinite for rows whose label has no prompts."""
        truth = self.truth[block.rows]
        ranks = np.full((len(truth), len(self.vectors)), np.inf, dtype=np.float32)
        known = np.flatnonzero(truth >= 0)
        for t, vectors in enumerate(self.vectors):
            cosines = block.unit(t, "image")[known] @ vectors.T
            right = cosines[np.arange(len(known)), truth[known]]
            ranks[known, t] = 1 + np.count_nonzero(cosines > (right + np.float32(TIE))[:, None], axis=1)
        return ranks


def _check_classes(classes: list[str], labels: pa.ChunkedArray, spec: ZeroShotScore) -> None:
    known = set(labels.unique().to_pylist()) - {None}
    strangers = [name for name in classes if name not in known]
    if strangers or len(classes) < 2:
        what = f"prompts for {', '.join(strangers)}" if strangers else f"prompts for {len(classes)} labels"
        raise ConfigError(
            f"{spec.prompts} has {what}; two labels or more must have prompts, and all be in column {spec.label!r} "
            f"of the store, which holds {', '.join(sorted(known)) or 'nothing'}"
        )


SCORERS: dict[type[PairScore], Callable[[Any, Columns, int], Scorer]] = {
    CosineScore: CosineScorer,
    RankScore: RankScorer,
    AgreementScore: AgreementScorer,
    ZeroShotScore: ZeroShotScorer,
}
"""Settings of a score to the scorer that is made from them, the pairs and the rule's seed."""
