"""Losses: the value of a term for each row. The objective reduces rows, teachers and ranks to one number. Shape
letters: Q query rows (this rank's), K keys (all ranks' and the bank's), D or E width; in front of them T teachers of
one width. A teacher's term is a function of a `Comparison` and one line in `terms.TERMS`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmkd.distill.terms import FeatureKind

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""Initial logarithm of a learned temperature."""
MAX_LOG_SCALE = math.log(100)
"""CLIP's upper bound."""

BLOCK = 1 << 25
"""Most logits of one direction that are held at once, 128 MiB in float32; what is made of them takes a few times as
much. Above it, rows are compared some at a time, and again on the way back."""


@dataclass(frozen=True)
class PairFeatures:
    """Features of n pairs, as they are to enter the dot products; every switch between unit and raw rows lies outside.
    image, text: float (n, D). group: int64 (n,) or (n, G); pairs that are equal in any column (one caption, one image)
    are positives of each other. available: bool (n, 2), which rows have an image, a text, or None for all; others are
    never keys, and their values need weight 0. As T teachers of one width see them (`stack_teachers`): image, text (T,
    n, D) and available (T, n, 2)."""

    image: torch.Tensor
    text: torch.Tensor
    group: torch.Tensor
    available: torch.Tensor | None = None

    @property
    def mask(self) -> torch.Tensor:
        """`available` as a mask, all True for None."""
        return self.group.new_ones(len(self.group), 2, dtype=torch.bool) if self.available is None else self.available

    @property
    def paired(self) -> torch.Tensor | None:
        """Rows with both, bool (..., n); None for all."""
        return None if self.available is None else self.available.all(-1)

    def rows(self, span: slice) -> "PairFeatures":
        """Return some of the rows, of all stacked teachers."""
        if span == slice(None):
            return self  # a slice would be a step of its own on the way back, and gradients be added in another order
        available = None if self.available is None else self.available[..., span, :]
        return PairFeatures(self.image[..., span, :], self.text[..., span, :], self.group[span], available)

    def of(self, teacher: int) -> "PairFeatures":
        """Return one of the stacked teachers."""
        available = None if self.available is None else self.available[teacher]
        return PairFeatures(self.image[teacher], self.text[teacher], self.group, available)


def stack_teachers(teachers: Sequence[PairFeatures]) -> PairFeatures:
    """Stack the same pairs as several teachers of one width see them, for losses of all of them at once."""
    image, text, available = (
        torch.stack([getattr(pairs, part) for pairs in teachers]) for part in ("image", "text", "mask")
    )
    return PairFeatures(image, text, teachers[0].group, available)


def unit(features: torch.Tensor) -> torch.Tensor:
    """Return rows of unit norm, in float32 or better; a row of zeros stays one."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def weighted_mean(values_Q: torch.Tensor, weights_Q: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """``sum_i w_i v_i / total``, and 0 when nothing has weight. `total` is the sum of the weights of all ranks: their
    values, and their gradients, then add up to those of one large batch, also when the ranks hold different numbers of
    available rows."""
    # A row without weight may hold anything, an infinity too.
    kept_Q = torch.where(weights_Q != 0, weights_Q * values_Q, 0)
    return kept_Q.sum() / total.clamp_min(torch.finfo(values_Q.dtype).tiny)


def in_blocks(values_of: Callable[[slice], torch.Tensor], queries: PairFeatures, keys: PairFeatures) -> torch.Tensor:
    """Return ``values_of`` all queries, float (..., Q). As it compares each of them with every key, above `BLOCK`
    logits it is asked for some rows at a time, and once more when their gradients are needed: memory is then bounded,
    whatever the batch."""
    count = len(queries.group)
    teachers = max(queries.image.shape[:-2].numel(), keys.image.shape[:-2].numel())
    size = max(1, BLOCK // max(1, teachers * len(keys.group)))
    if count <= size:
        return values_of(slice(None))
    parts = [
        checkpoint(values_of, slice(first, first + size), use_reentrant=False, preserve_rng_state=False)
        for first in range(0, count, size)
    ]
    return torch.cat(parts, dim=-1)


def contrast(
    queries_QD: torch.Tensor,
    keys_KD: torch.Tensor,
    scale: torch.Tensor,
    positive_QK: torch.Tensor,
    available_K: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each query against the available keys A, float (..., Q). With P(i) the positive keys of i among
    A: ``v_i = log sum_{j in A} exp(s q_i . k_j) - 1/|P(i)| sum_{j in P(i)} s q_i . k_j``. With one positive per query
    it is CLIP's loss in one direction (arXiv 2103.00020, figure 3); with several it is the form of supervised contrast
    that keeps the mean outside the logarithm (arXiv 2004.11362, equation 2). A query without a positive gives the first
    term alone; the caller weighs it 0. Several teachers may go in at once, in front of the other axes: features (T, n,
    D), scale (T, 1, 1), available (T, K)."""
    logits_QK = scale * queries_QD @ keys_KD.mT
    if available_K is not None:
        # The lowest number and not -inf: with no key at all the value stays finite, and 0 * inf never happens.
        available_1K = available_K[..., None, :]
        logits_QK = logits_QK.masked_fill(~available_1K, torch.finfo(logits_QK.dtype).min)
        positive_QK = positive_QK & available_1K
    matched_Q = torch.where(positive_QK, logits_QK, 0).sum(-1) / positive_QK.sum(-1).clamp_min(1)
    return logits_QK.logsumexp(-1) - matched_Q


def both_ways(queries: PairFeatures, keys: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """Return the mean of `contrast` of images against texts and of texts against images, float (..., Q); rows without
    both are no keys."""

    def some(span: slice) -> torch.Tensor:
        here = queries.rows(span)
        positive_QK = here.group[:, None] == keys.group[None, :]
        if positive_QK.dim() == 3:
            positive_QK = positive_QK.any(-1)
        to_text = contrast(here.image, keys.text, scale, positive_QK, keys.paired)
        to_image = contrast(here.text, keys.image, scale, positive_QK, keys.paired)
        return (to_text + to_image) / 2

    return in_blocks(some, queries, keys)


def task_loss(student: PairFeatures, all_students: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy (arXiv 2103.00020, figure 3), float (Q,). ``1/2 [ contrast(s_img, S_txt) +
    contrast(s_txt, S_img) ]``, unit rows; `scale` is exp of the learned temperature. student: the rows of this rank.
    all_students: those of all ranks, the gradient flowing back to each."""
    return both_ways(student, all_students, scale)


def feature_loss(student: PairFeatures, teacher: PairFeatures, kind: FeatureKind) -> torch.Tensor:
    """``d(s_img, t_img) + d(s_txt, t_txt)``, float (..., Q), each where the teacher's feature is available. d is one of

    - cosine: ``1 - s . t`` of unit rows, half their squared distance, whatever the width E;
    - mse: ``1/E sum_e (s_e - t_e)^2`` (FD of CLIP-KD, arXiv 2307.12732); of unit rows it is 2/E of the
      above, so its weight has to grow with the width;
    - smooth_l1: ``1/E sum_e h(sqrt(E) (s_e - t_e))`` with ``h(x) = x^2/2`` up to 1 and ``|x| - 1/2`` beyond: Huber's
      loss of rows whose entries have unit mean square, as UNIC applies it to standardized features (arXiv 2408.05088).
    """
    image, text = _distance(student.image, teacher.image, kind), _distance(student.text, teacher.text, kind)
    return image + text if teacher.available is None else image * teacher.mask[..., 0] + text * teacher.mask[..., 1]


def _distance(student_QE: torch.Tensor, teacher_QE: torch.Tensor, kind: FeatureKind) -> torch.Tensor:
    if kind == "cosine":
        return 1 - (student_QE * teacher_QE).sum(-1)
    if kind == "mse":
        return (student_QE - teacher_QE).square().mean(-1)
    root = student_QE.shape[-1] ** 0.5
    return F.smooth_l1_loss(root * student_QE, root * teacher_QE, reduction="none").mean(-1)


def bank_loss(student: PairFeatures, teacher: PairFeatures, bank: PairFeatures, scale: torch.Tensor) -> torch.Tensor:
    """`Comparison.cross` with the bank's rows as further keys, float (Q,). ``1/2 [ contrast(s_img, T_txt + B_txt) +
    contrast(s_txt, T_img + B_img) ]``, + for one list after the other. Unlike a queue of momentum features (MoCo, arXiv
    1911.05722) these keys never age: the teacher does not move. A bank row with the caption of a query is a positive.
    Rows of the batch itself must not be available in the bank, so that no key counts twice; with a bank of all rows the
    value is then that of the whole data set, whatever the batch.
    """
    keys = PairFeatures(
        torch.cat([teacher.image, bank.image]),
        torch.cat([teacher.text, bank.text]),
        torch.cat([teacher.group, bank.group]),
        torch.cat([teacher.mask, bank.mask]),
    )
    return both_ways(student, keys, scale)


@dataclass(frozen=True)
class Similarities:
    """One side of the comparison: rows of this rank, rows of all ranks, and the scale of their softmax."""

    rows: PairFeatures
    keys: PairFeatures
    scale: torch.Tensor
    known: torch.Tensor | None = None
    """Added to the logits of the keys' texts, images: float (2, ..., K)."""

    def log_softmax(self, span: slice, available_K2: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Image to text and text to image of these rows, each (..., Q, K), over the available keys."""
        rows = self.rows.rows(span)
        to_text = self.scale * rows.image @ self.keys.text.mT
        to_image = self.scale * rows.text @ self.keys.image.mT
        if self.known is not None:
            to_text, to_image = to_text + self.known[0, ..., None, :], to_image + self.known[1, ..., None, :]
        if available_K2 is not None:
            lowest = torch.finfo(to_text.dtype).min
            no_image_1K, no_text_1K = (~available_K2[..., None, :, :]).unbind(-1)
            to_text, to_image = to_text.masked_fill(no_text_1K, lowest), to_image.masked_fill(no_image_1K, lowest)
        return to_text.log_softmax(-1), to_image.log_softmax(-1)


def relational_loss(student: Similarities, teacher: Similarities) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's similarities from the teacher's, both directions, float (..., Q).
    ``p_ij = softmax_j(a t_img_i . t_txt_j)``, ``q_ij = softmax_j(b s_img_i . s_txt_j)``, ``v_i = sum_j p_ij log(p_ij /
    q_ij)``, averaged with the same of texts against images: CRD of CLIP-KD (arXiv 2307.12732), affinity mimicking of
    TinyCLIP (arXiv 2309.12314) up to the teacher's entropy, a constant. Keys that the teacher lacks are left out of
    both softmaxes; with `known`, keys that other teachers know better lose their share of p and stay in q. An image
    without a text has the first direction alone, a text the other."""
    available_K2 = teacher.keys.available

    def some(span: slice) -> torch.Tensor:
        log_p = teacher.log_softmax(span, available_K2)
        log_q = student.log_softmax(span, available_K2)
        ways = [(p.exp() * (p - q)).sum(-1) for p, q in zip(log_p, log_q, strict=True)]
        if available_K2 is not None:
            ways = [way * there for way, there in zip(ways, teacher.rows.rows(span).mask.unbind(-1), strict=True)]
        return (ways[0] + ways[1]) / 2

    return in_blocks(some, teacher.rows, teacher.keys)


@dataclass(frozen=True)
class Comparison:
    """T teachers of one width against the student. mapped: the student's rows of this rank in each teacher's space,
    stacked. teachers, all_teachers: the teachers' rows of this rank and of all ranks, stacked. own, every: the
    student's rows, likewise, in its own space. scale: of logits against the teachers' keys, (T, 1, 1) or a scalar.
    student_scale: of the student's own logits. teacher_scale: (T, 1, 1) of each teacher's own logits. banks: rows of
    each teacher's bank, when there is one. feature_kind: distance of the feature term. known: float (2, T, K), see
    `Policy.knowledge`; None to take a teacher's similarities of all keys as they are."""

    mapped: PairFeatures
    teachers: PairFeatures
    all_teachers: PairFeatures
    own: PairFeatures
    every: PairFeatures
    scale: torch.Tensor
    student_scale: torch.Tensor
    teacher_scale: torch.Tensor
    banks: Sequence[PairFeatures]
    feature_kind: FeatureKind
    known: torch.Tensor | None = None

    def feature(self) -> torch.Tensor:
        """Return `feature_loss`, float (T, Q)."""
        return feature_loss(self.mapped, self.teachers, self.feature_kind)

    def cross(self) -> torch.Tensor:
        """ICL of CLIP-KD (arXiv 2307.12732), float (T, Q): ``1/2 [ contrast(s_img, T_txt) + contrast(s_txt, T_img) ]``,
        of this rank's rows in the teacher's space against the teacher's rows of the whole batch."""
        return both_ways(self.mapped, self.all_teachers, self.scale)

    def bank(self) -> torch.Tensor:
        """Return `bank_loss`, float (T, Q), one teacher after the other: stacking would copy every bank again."""
        scales = self.scale.expand(len(self.banks), 1, 1)
        mapped, keys = self.mapped, self.all_teachers
        return torch.stack([bank_loss(mapped.of(t), keys.of(t), bank, scales[t]) for t, bank in enumerate(self.banks)])

    def relational(self) -> torch.Tensor:
        """Return `relational_loss`, float (T, Q)."""
        student = Similarities(self.own, self.every, self.student_scale)
        teacher = Similarities(self.teachers, self.all_teachers, self.teacher_scale, self.known)
        return relational_loss(student, teacher)
