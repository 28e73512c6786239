"""An objective from a run's configuration and its store."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError
from mmkd.distill.bank import Bank, BankSource
from mmkd.distill.config import RunConfig
from mmkd.distill.heads import Heads, fixed_alignment, meeting_widths
from mmkd.distill.losses import unit
from mmkd.distill.objective import Objective, TeacherSide
from mmkd.distill.policies import Policy, Standard
from mmkd.distill.targets import Preparation
from mmkd.distill.teacher_features import TeacherFeatures

# Logits of a teacher whose card has no temperature: CLIP's first one, 1/0.07 (arXiv 2103.00020, section 2.5).
_USUAL_SCALE = 1 / 0.07
_STANDARD_ROWS = 16384
"""Rows on which a teacher's usual score is measured, spread evenly over the run's."""
_KNOWN_CAPTIONS = 4096
"""Captions with which images are compared to see whether a teacher knows them, spread evenly over the run's."""


def make_objective(
    config: RunConfig,
    student_dim: int,
    teachers: TeacherFeatures | None,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    device: torch.device,
) -> Objective:
    """Build the objective of a run, on `device`. Raises ConfigError, UserError if widths, teachers' names or the
    alignment do not fit the store.

    Args:
        config: of the run.
        student_dim: width of the student's features.
        teachers: None when no term asks them.
        rows: int64 (n,) grid rows of the run.
        groups: int64 (n, 2), see `Batch.groups`.
        device: of heads and bank.
    """
    if teachers is None:
        return Objective(config.loss, None)
    loss = config.loss
    alignment = fixed_alignment(config.heads, teachers)
    widths = meeting_widths(teachers, alignment)
    if loss.mixed_teachers and (config.policy.kind != "one" or config.policy.drop or len(set(widths)) > 1):
        raise ConfigError(
            f"loss.mixed_teachers wants policy {{kind: one}} without drop and teachers of one width, "
            f"here {{kind: {config.policy.kind}}} and widths {', '.join(map(str, sorted(set(widths))))}; "
            "name an alignment in `heads`"
        )
    heads = (
        Heads("none", student_dim, teachers.slugs, widths)
        if loss.mixed_teachers
        else Heads(config.heads.kind, student_dim, teachers.slugs, widths)
    )
    prepare = Preparation(teachers.slugs, None if alignment is None else alignment.to(device), loss.unit_teachers)
    bank = None
    if "bank" in loss.teacher_terms:
        group = groups if loss.equal_captions else rows
        source = BankSource(rows, group, teachers.gather, prepare)
        bank = Bank(source, loss.bank_rows.size, loss.bank_rows.refresh, config.seed, device)
    scales = [card.logit_scale or _USUAL_SCALE for card in teachers.cards.values()]
    side = TeacherSide(heads, prepare, _policy(config, teachers, rows, groups, device), scales, bank)
    return Objective(loss, side).to(device)


def _policy(
    config: RunConfig,
    teachers: TeacherFeatures,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    device: torch.device,
) -> Policy:
    policy = config.policy
    unknown = set(policy.weights) - set(teachers.slugs)
    if unknown:
        raise ConfigError(
            f"policy.weights names {', '.join(sorted(unknown))}; the run's teachers are {', '.join(teachers.slugs)}"
        )
    if policy.kind == "weighted":
        weights = torch.tensor([policy.weights.get(slug, 1.0) for slug in teachers.slugs])
        if not weights.any():
            raise ConfigError(
                f"policy.weights is 0 for every teacher of the run ({', '.join(teachers.slugs)}); give one more than 0"
            )
        return Policy(policy, config.seed, weights=weights)
    if policy.kind == "best":
        targets = teachers.gather(rows[_spread(len(rows), _STANDARD_ROWS)])
        captions: list[torch.Tensor] = []
        if policy.by == "corpus":
            first = np.unique(groups[:, 0], return_index=True)[1]
            texts = teachers.gather(rows[first[_spread(len(first), _KNOWN_CAPTIONS)]])
            captions = [unit(found.text[found.present]).to(device) for found in texts]
            if lacking := [slug for slug, known in zip(teachers.slugs, captions, strict=True) if not len(known)]:
                raise ConfigError(f"policy.by corpus: {lacking[0]} has no features of the run's captions; leave it out")
        return Policy(policy, config.seed, standard=Standard.of(targets, captions))
    return Policy(policy, config.seed)


def _spread(count: int, wanted: int) -> NDArray[np.int64]:
    """`wanted` places of `count`, or all, at even distances."""
    return np.unique(np.linspace(0, count - 1, wanted).astype(np.int64))
