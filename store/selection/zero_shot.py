"""Whether a teacher recognises a row's label, by prompts whose features lie in another store: no model is loaded."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mmkd.base.errors import ConfigError, TeacherMismatchError, UserError
from mmkd.store.layout import TEXT_SOUND
from mmkd.store.reader import FeatureStore
from mmkd.store.selection.block import TIE, Block, Columns, Floats, Rows, unit_rows
from mmkd.store.selection.rule import ZeroShotScore


class ZeroShotScorer:
    """Rank of the row's label by its prompts."""

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
        """Mean of each label's unit prompts, again unit: float32 (C, D). Radford et al. 2021, section 3.1.4."""
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
