"""Fit an alignment, and judge it on rows that it was not fitted on: shares, 1 is best, and an effective rank."""

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from mmkd.base.config import Frozen
from mmkd.base.errors import UserError
from mmkd.distill.alignment import Alignment, AlignmentCard, TeacherMap, save
from mmkd.distill.alignment.closed_form import fit_pca, fit_procrustes, fit_whitening
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.distill.alignment.trained import fit_autoencoder, fit_joint
from mmkd.store import FeatureStore
from mmkd.store.layout import TOWERS, Tower

NEIGHBORS = 10

FitMethod = Callable[[AlignmentRows, Any, int, int], dict[str, TeacherMap]]
"""Rows, settings, width and seed to a map of each teacher; equal seeds give equal maps. Only rows to fit on are
seen."""

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


class TeacherScores(Frozen):
    """Scores of one teacher's space."""

    rows: int
    reconstruction: float
    """Share of its variance that the best linear map (pseudo-inverse) recovers from the aligned features."""
    neighbors: float
    """Share of each image's ten nearest neighbors that stay its nearest (overlap of arXiv 2405.07987)."""
    effective_rank: float
    """exp of the entropy of the aligned features' normalized variances (Roy and Vetterli 2007)."""


class AlignmentScores(Frozen):
    """Scores of an alignment. Retrieval is recall at 1 among the judged rows; an equal caption is a right answer."""

    rows: int
    gallery: float
    """Mean number of rows that two teachers share, among which recall at 1 chooses."""
    image_to_text: float | None
    """Image of one teacher against texts of another, mean over ordered pairs of teachers; None when widths differ."""
    image_to_image: float | None
    """Image of one teacher against images of another."""
    own_image_to_text: float
    """Image against texts of the same teacher, for comparison."""
    teachers: dict[str, TeacherScores]

    def lines(self) -> Iterator[str]:
        """Yield the scores as a user reads them."""

        def percent(share: float | None) -> str:
            return "-" if share is None else f"{share:.1%}"

        yield f"evaluated on {self.rows:,} rows with held-out captions; recall at 1 of {self.gallery:,.0f} on average"
        yield f"  image of one teacher to text of another   {percent(self.image_to_text):>7}"
        yield f"  image of one teacher to image of another  {percent(self.image_to_image):>7}"
        yield f"  image to text of the same teacher         {percent(self.own_image_to_text):>7}"
        width = max((len(slug) for slug in self.teachers), default=7)
        yield f"{'teacher':{width}}  {'rows':>8}  {'variance kept':>13}  {'neighbors kept':>15}  {'effective rank':>14}"
        for slug, one in self.teachers.items():
            shares = f"{percent(one.reconstruction):>13}  {percent(one.neighbors):>15}"
            yield f"{slug:{width}}  {one.rows:8,}  {shares}  {one.effective_rank:14.1f}"


@torch.no_grad()
def judge(alignment: Alignment, rows: AlignmentRows) -> AlignmentScores:
    """Score on `rows.judged`, at the cost of a product of these rows with themselves for each two teachers."""
    raw = rows.gather(rows.judged)
    mapped: dict[tuple[str, Tower], torch.Tensor] = {
        (slug, tower): alignment(slug, tower, raw[slug].tower(tower)) for slug in rows.slugs for tower in TOWERS
    }
    members = {slug: raw[slug].members.numpy() for slug in rows.slugs}
    captions = rows.judged_captions
    unit = {key: F.normalize(values, dim=-1) for key, values in mapped.items()}
    crossed: dict[Tower, list[float]] = {tower: [] for tower in TOWERS}
    shared = []
    for one, other in permutations(rows.slugs, 2):
        _, a, b = np.intersect1d(members[one], members[other], return_indices=True)
        if len(a) < 2 or alignment.width(one) != alignment.width(other):
            continue
        shared.append(len(a))
        same = captions[members[one][a]]
        for tower in TOWERS:
            crossed[tower].append(recall_at_1(unit[one, "image"][a], unit[other, tower][b], same))
    own = [
        recall_at_1(unit[slug, "image"], unit[slug, "text"], captions[members[slug]])
        for slug in rows.slugs
        if len(members[slug]) > 1
    ]
    return AlignmentScores(
        rows=len(rows.judged),
        gallery=float(np.mean(shared)) if shared else 0.0,
        image_to_text=float(np.mean(crossed["text"])) if shared else None,
        image_to_image=float(np.mean(crossed["image"])) if shared else None,
        own_image_to_text=float(np.mean(own)) if own else 0.0,
        teachers={
            slug: TeacherScores(
                rows=len(members[slug]),
                reconstruction=_reconstruction(alignment, slug, raw[slug].image, raw[slug].text),
                neighbors=neighbor_overlap(raw[slug].image, mapped[slug, "image"]),
                effective_rank=effective_rank(torch.cat([mapped[slug, tower] for tower in TOWERS])),
            )
            for slug in rows.slugs
            if len(members[slug]) > NEIGHBORS + 1
        },
    )


def recall_at_1(queries_MD: torch.Tensor, keys_MD: torch.Tensor, captions_M: NDArray[np.int64]) -> float:
    """Return the share of unit queries whose nearest key has the same row or caption; chance is about 1 / M."""
    best = (queries_MD @ keys_MD.T).argmax(dim=1).numpy()
    return float(np.mean(captions_M[best] == captions_M))


def neighbor_overlap(before_ME: torch.Tensor, after_MD: torch.Tensor, k: int = NEIGHBORS) -> float:
    """Return the mean share of the k nearest neighbors by cosine that two spaces have in common."""
    near = []
    for features in (before_ME, after_MD):
        unit = F.normalize(features, dim=-1)
        cosines = (unit @ unit.T).fill_diagonal_(-2.0)
        near.append(cosines.topk(k, dim=1).indices)
    return float((near[0][:, :, None] == near[1][:, None, :]).any(dim=2).float().mean())


def effective_rank(features_MD: torch.Tensor) -> float:
    """``exp(-sum p log p)`` with p the normalized eigenvalues of the covariance; from 1 to D."""
    centered = features_MD.double() - features_MD.double().mean(dim=0)
    variances = torch.linalg.svdvals(centered).square()
    p = variances / variances.sum()
    p = p[p > 0]
    return float((-(p * p.log()).sum()).exp())


def _reconstruction(alignment: Alignment, slug: str, image: torch.Tensor, text: torch.Tensor) -> float:
    """Return 1 - error / variance, each tower about its own mean, of the features before the map."""
    weight = alignment.teacher_map(slug).weight.double()
    back = torch.linalg.pinv(weight) @ weight
    centered = torch.cat([tower.double() - tower.double().mean(dim=0) for tower in (image, text)])
    error = centered - centered @ back.T
    return float(1 - error.square().sum() / centered.square().sum())
