"""Fit and judge an alignment from a store and a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mmkd.base.errors import UserError
from mmkd.distill.alignment.closed_form import fit_pca, fit_procrustes, fit_whitening
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.alignment.judge import judge
from mmkd.distill.alignment.maps import Alignment, AlignmentCard, TeacherMap, save
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.distill.alignment.trained import fit_autoencoder, fit_joint
from mmkd.store import FeatureStore

FitMethod = Callable[[AlignmentRows, Any, int, int], dict[str, TeacherMap]]
"""Rows, settings, width and seed to one affine map for each teacher. It sees the rows to fit on only, and gives equal
maps for equal seeds."""

METHODS: dict[str, FitMethod] = {
    "none": lambda rows, settings, dim, seed: {},
    "pca": fit_pca,
    "whitening": fit_whitening,
    "procrustes": fit_procrustes,
    "joint": fit_joint,
    "autoencoder": fit_autoencoder,
}


def align(store: FeatureStore, config: AlignConfig) -> Alignment:
    """Fit, judge, and write `config.out`. Raises UserError, ConfigError if the rows, teachers or settings do not fit
    the store; StoreError if the file cannot be written."""
    if config.out.suffix != ".safetensors":
        raise UserError(f"out is {config.out}, expected a name that ends with .safetensors")
    rows = AlignmentRows(store, config)
    kind, settings = config.method.kind, config.method.chosen
    maps = METHODS[kind](rows, settings, config.dim, config.seed)
    strange = [slug for slug, fitted in maps.items() if not bool(torch.isfinite(fitted.weight).all())]
    if strange:
        raise UserError(f"{kind} gave no finite map for {strange[0]}; do its features vary? lower dim {config.dim}")
    card = AlignmentCard(
        method=kind,
        settings=settings.model_dump(mode="json"),
        dim=config.dim if maps else None,
        unit_input=config.unit_input,
        teachers={slug: store.card(slug).digest for slug in rows.slugs},
        widths=rows.widths,
        corpus=store.record.corpus.digest,
        rows=len(rows.fit),
        seed=config.seed,
    )
    scores = judge(Alignment(card, maps), rows)
    alignment = Alignment(card.model_copy(update={"scores": scores.model_dump(mode="json")}), maps)
    save(alignment, config.out)
    return alignment
