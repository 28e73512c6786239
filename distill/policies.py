"""Each sample's shares of its teachers, pure functions of (seed, epoch, position), whatever batch size, ranks or
resumptions. Shapes: B rows of this rank, T teachers. A row sums to 1, or to 0 for a sample without teacher."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError
from mmkd.distill.batches import Batch
from mmkd.distill.captions import evenly
from mmkd.distill.config import PolicyConfig
from mmkd.distill.draws import draws
from mmkd.distill.losses import unit
from mmkd.distill.teacher_features import TeacherFeatures, TeacherTargets
from mmkd.store.layout import TOWERS

_STANDARD_ROWS = 16384
"""Rows on which a teacher's usual score is measured, spread evenly over the run's."""
_KNOWN_CAPTIONS = 4096
"""Captions with which images are compared to see whether a teacher knows them, spread evenly over the run's."""
_KNOWN_IMAGES = 4096
"""Likewise of images, for captions."""
_LOOKED_AT = 1 << 20
"""Rows, spread evenly, among which those are looked for."""
_SURE = 0.5
"""Standard deviations by which one teacher's score exceeds another's when it is e times as sure to know a row."""
_ROWS_AT_ONCE = 1024


def all_teachers(available_BT: torch.Tensor) -> torch.Tensor:
    """Return equal shares of the available teachers."""
    return _normalize(available_BT.float())


def one_teacher(available_BT: torch.Tensor, drawn_B: torch.Tensor) -> torch.Tensor:
    """Return shares that choose one available teacher uniformly; MMKD-CLIP's policy."""
    count_B = available_BT.sum(1)
    chosen_B = (drawn_B * count_B).long()
    number_BT = available_BT.cumsum(1) - 1
    return (available_BT & (number_BT == chosen_B[:, None])).float()


def drawn_teacher(seed: int, epoch: int, positions_B: torch.Tensor, available_BT: torch.Tensor) -> torch.Tensor:
    """Return the shares of policy `one`, float32 (B, T), a function of (seed, epoch, position)."""
    return one_teacher(available_BT, draws(seed, epoch, positions_B, 1)[:, 0])


def weighted_teachers(available_BT: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    """Return shares in proportion to fixed weights."""
    return _normalize(available_BT * weights_T)


def best_teachers(available_BT: torch.Tensor, scores_BT: torch.Tensor, count: int) -> torch.Tensor:
    """Return equal shares of the `count` available teachers with the highest score; the first of the list at a tie.
    Those whose score is NaN cannot be judged and have a share beside them."""
    unjudged_BT = scores_BT.isnan()
    judged_BT = scores_BT.masked_fill(~available_BT | unjudged_BT, -torch.inf)
    order_BT = judged_BT.argsort(dim=1, descending=True, stable=True)
    best_BT = torch.zeros_like(available_BT).scatter(1, order_BT[:, :count], True)
    return _normalize(((best_BT | unjudged_BT) & available_BT).float())


def drop_teachers(
    shares_BT: torch.Tensor, losses_BT: torch.Tensor, drawn_BT: torch.Tensor, chance: float
) -> torch.Tensor:
    """Leave out each teacher with this chance, but for the one whose loss is largest (UNIC, arXiv 2408.05088). The rest
    is scaled to sum to 1, so that the size of the loss does not depend on `chance`."""
    taking_part_BT = shares_BT > 0
    worst_B = losses_BT.detach().masked_fill(~taking_part_BT, -torch.inf).argmax(dim=1, keepdim=True)
    kept_BT = (drawn_BT >= chance).scatter(1, worst_B, True)
    return _normalize(shares_BT * kept_BT)


def _normalize(shares_BT: torch.Tensor) -> torch.Tensor:
    return shares_BT / shares_BT.sum(1, keepdim=True).clamp_min(torch.finfo(shares_BT.dtype).tiny)


def agreement(target: TeacherTargets) -> torch.Tensor:
    """Cosine of a teacher's own image and text, float32 (B,): how well the caption fits in this teacher's view."""
    return torch.cosine_similarity(target.image.float(), target.text.float(), dim=-1)


def familiarity(target: TeacherTargets, captions_UE: torch.Tensor) -> torch.Tensor:
    """Largest cosine of a teacher's image with any of these captions (unit rows), float32 (B,). A high value means that
    the teacher knows such images, whatever their captions."""
    pieces = torch.split(unit(target.image), _ROWS_AT_ONCE)
    return torch.cat([(piece_BE @ captions_UE.to(piece_BE).T).amax(dim=1) for piece_BE in pieces])


@dataclass(frozen=True)
class Standard:
    """Usual score of each teacher: cosines of teachers are compared in deviations from their means. captions: float32
    (U, E) of each teacher, unit rows, for `familiarity`; empty for `agreement`. mean, deviation: float32 (T,)."""

    captions: Sequence[torch.Tensor]
    mean: torch.Tensor
    deviation: torch.Tensor

    @classmethod
    def of(cls, targets: Sequence[TeacherTargets], captions: Sequence[torch.Tensor] = ()) -> "Standard":
        """Estimate from a sample of rows; a teacher with fewer than two has mean 0 and deviation 1."""
        judged = [target.present[:, 0] if captions else target.present.all(1) for target in targets]
        found = [values[mine] for mine, values in zip(judged, _raw_scores(targets, captions), strict=True)]
        mean = [values.mean() if len(values) > 1 else values.new_zeros(()) for values in found]
        deviation = [values.std() if len(values) > 1 else values.new_ones(()) for values in found]
        return cls(captions, torch.stack(mean), torch.stack(deviation).clamp_min(1e-6))

    def scores(self, targets: Sequence[TeacherTargets]) -> torch.Tensor:
        """Deviations from each teacher's mean, float32 (B, T)."""
        cosines_BT = torch.stack(_raw_scores(targets, self.captions), dim=1)
        return (cosines_BT - self.mean.to(cosines_BT.device)) / self.deviation.to(cosines_BT.device)


def _raw_scores(targets: Sequence[TeacherTargets], captions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if not captions:
        return [agreement(target) for target in targets]
    return [familiarity(target, known_UE) for target, known_UE in zip(targets, captions, strict=True)]


@dataclass(frozen=True)
class Policy:
    """A run's policy. weights_T: float32 (T,), for `weighted`. standard: for `best`. text_standard: of captions, whose
    familiarity is the largest cosine with any image of the run: for `keys: known` and rows without an image. judged:
    numbers of the teachers that `standard` judges, those with both towers."""

    config: PolicyConfig
    seed: int
    weights: torch.Tensor | None = None
    standard: Standard | None = None
    text_standard: Standard | None = None
    judged: Sequence[int] = ()

    def scores(self, batch: Batch) -> torch.Tensor | None:
        """Return how well each teacher knows each row, float32 (B, T), NaN for teachers with one tower; None unless the
        policy asks for it. A row's image is judged; its caption where there is no image."""
        if self.standard is None:
            return None
        targets = [batch.targets[number] for number in self.judged]
        found_BJ = self.standard.scores(targets)
        if batch.has is not None:
            assert self.text_standard is not None  # of every run with rows alone
            found_BJ = torch.where(batch.has[:, :1], found_BJ, self.text_standard.scores(_swapped(targets)))
        return self._all_teachers(found_BJ, len(batch.targets))

    def _all_teachers(self, found_BJ: torch.Tensor, teachers: int) -> torch.Tensor:
        every_BT = found_BJ.new_full((len(found_BJ), teachers), torch.nan)
        every_BT[:, self.judged] = found_BJ
        return every_BT

    def shares(self, batch: Batch, scores_BT: torch.Tensor | None) -> torch.Tensor:
        """Return float32 (B, T), from `scores` of the same batch."""
        available_BT = torch.stack([target.present.any(1) for target in batch.targets], dim=1)
        if self.config.kind == "one":
            return drawn_teacher(self.seed, batch.epoch, batch.positions, available_BT)
        if self.weights is not None:
            return weighted_teachers(available_BT, self.weights.to(available_BT.device))
        if scores_BT is not None:
            return best_teachers(available_BT, scores_BT, self.config.best)
        return all_teachers(available_BT)

    def knowledge(self, batch: Batch, scores_BT: torch.Tensor | None) -> torch.Tensor | None:
        """Return the logarithm of each available teacher's share in knowing a row's caption and image, float32 (B, T,
        2): a softmax over teachers of `scores` of the same batch. None without `keys: known`."""
        if scores_BT is None or self.text_standard is None or self.config.keys != "known":
            return None
        texts_BJ = self.text_standard.scores(_swapped([batch.targets[number] for number in self.judged]))
        scores_BT2 = torch.stack([self._all_teachers(texts_BJ, scores_BT.shape[1]), scores_BT], dim=2)
        lacking_BT2 = ~torch.stack([target.present.flip(1) for target in batch.targets], dim=1) | scores_BT2.isnan()
        lowest = torch.finfo(scores_BT2.dtype).min
        return (scores_BT2 / _SURE).masked_fill(lacking_BT2, lowest).log_softmax(dim=1)

    def after_losses(self, shares_BT: torch.Tensor, losses_BT: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Return the shares after teacher dropping, which looks at the losses; float32 (B, T)."""
        if not self.config.drop:
            return shares_BT
        # Column 0 chooses the one teacher; dropping has draws of its own.
        drawn_BT = draws(self.seed, batch.epoch, batch.positions, 1 + shares_BT.shape[1])[:, 1:]
        return drop_teachers(shares_BT, losses_BT, drawn_BT, self.config.drop)


def make_policy(
    config: PolicyConfig,
    seed: int,
    teachers: TeacherFeatures,
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    device: torch.device,
    *,
    unpaired: bool = False,
) -> Policy:
    """Build a run's policy from grid rows int64 (n,) that stand for all of its, and their `Batch.groups`, (n, 2).
    unpaired: the run may have rows with an image or a caption alone, whether these rows do or not. Raises ConfigError
    if its weights or captions do not fit the run's teachers."""
    named = ", ".join(teachers.slugs)
    if unknown := set(config.weights) - set(teachers.slugs):
        raise ConfigError(f"policy.weights names {', '.join(sorted(unknown))}; the run's teachers are {named}")
    if config.kind == "weighted":
        weights = torch.tensor([config.weights.get(slug, 1.0) for slug in teachers.slugs])
        if not weights.any():
            raise ConfigError(f"policy.weights is 0 for every teacher of the run ({named}); give one more than 0")
        return Policy(config, seed, weights=weights)
    if config.kind != "best":
        return Policy(config, seed)
    judged = tuple(number for number, towers in enumerate(teachers.towers) if towers == TOWERS)

    def gather(chosen: NDArray[np.int64], most: int) -> list[TeacherTargets]:
        targets = teachers.gather(chosen[evenly(len(chosen), most)])
        return [targets[number] for number in judged]

    def known(targets: Sequence[TeacherTargets], what: str) -> list[torch.Tensor]:
        if not len(targets[0].present):
            seen = f"none of the {len(rows):,} rows it looks at has {what}"
            raise ConfigError(f"policy.by corpus: {seen}; take another policy")
        found = [unit(target.text[target.present[:, 1]]).to(device) for target in targets]
        if lacking := [teachers.slugs[number] for number, mine in zip(judged, found, strict=True) if not len(mine)]:
            seen = f"none of the {len(targets[0].present):,} {what} it looks at"
            raise ConfigError(f"policy.by corpus: {lacking[0]} has features of {seen}; leave it out")
        return found

    some = evenly(len(rows), _LOOKED_AT)
    rows, groups = rows[some], groups[some]
    images = rows[groups[:, 1] >= 0]
    standing = gather(images, _STANDARD_ROWS)
    if config.by == "caption":
        return Policy(config, seed, standard=Standard.of(standing), judged=judged)
    said = np.flatnonzero(groups[:, 0] >= 0)
    first = np.sort(said[np.unique(groups[said, 0], return_index=True)[1]])
    texts = gather(rows[first], _KNOWN_CAPTIONS)
    standard, text_standard = Standard.of(standing, known(texts, "captions")), None
    if config.keys == "known" or unpaired:
        text_standard = Standard.of(_swapped(texts), known(_swapped(gather(images, _KNOWN_IMAGES)), "images"))
    return Policy(config, seed, standard=standard, text_standard=text_standard, judged=judged)


def _swapped(targets: Sequence[TeacherTargets]) -> list[TeacherTargets]:
    """Return captions in the place of images, and the reverse: to be scored as these are."""
    return [TeacherTargets(target.text, target.image, target.present.flip(1)) for target in targets]
