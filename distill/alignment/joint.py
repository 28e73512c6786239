"""Linear maps that are trained together: two teachers' features of one sample shall find each other among others'."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmkd.distill.alignment.config import JointSettings, ProcrustesSettings
from mmkd.distill.alignment.maps import TeacherMap
from mmkd.distill.alignment.moments import Moments, moments
from mmkd.distill.alignment.procrustes import fit_procrustes
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.distill.alignment.training import Batch, train
from mmkd.store.layout import TOWERS


class JointMaps(nn.Module):
    """One matrix a teacher; features are centred first, and unit afterwards."""

    def __init__(self, found: dict[str, Moments], begin: dict[str, torch.Tensor], temperature: float) -> None:
        super().__init__()
        self.slugs, self.found = tuple(found), found
        self.weights = nn.ParameterList(nn.Parameter(begin[slug].clone()) for slug in found)
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """InfoNCE over the rows that two teachers share, for a random ring of teachers.

        The teachers that have rows are put in a random circle, and each is contrasted with the next: its images
        with the other's texts and images, its texts with the other's images and texts. A step costs one product
        a teacher, and every two teachers meet in the end.
        """
        out = {slug: self._mapped(slug, batch) for slug in self.slugs if len(batch[slug].members) > 1}
        present = [list(out)[i] for i in torch.randperm(len(out), generator=generator).tolist()]
        terms = []
        for one, other in zip(present, [*present[1:], *present[:1]], strict=True):
            a, b = _shared(batch[one].members, batch[other].members)
            if len(a) < 2:
                continue
            for tower in TOWERS:
                for against in TOWERS:
                    if one == other and tower == against:
                        continue  # a teacher alone: its images with its texts, and not with themselves
                    logits = self.log_scale.exp() * out[one][tower][a] @ out[other][against][b].T
                    target = torch.arange(len(a), device=logits.device)
                    terms.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
        return torch.stack(terms).mean() if terms else self.log_scale * 0

    def _mapped(self, slug: str, batch: Batch) -> dict[str, torch.Tensor]:
        weight, own = self.weights[self.slugs.index(slug)], self.found[slug]
        means = {tower: own.means[tower].float().to(weight.device) for tower in TOWERS}
        return {
            tower: F.normalize(F.linear(batch[slug].tower(tower) - means[tower], weight), dim=-1) for tower in TOWERS
        }


def _shared(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the same batch positions stand in two ascending lists of them."""
    return torch.nonzero(torch.isin(one, other))[:, 0], torch.nonzero(torch.isin(other, one))[:, 0]


def fit_joint(rows: AlignmentRows, settings: JointSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """Train the maps from Procrustes rotations on; within a batch equal captions count as strangers."""
    found = moments(rows, settings.centre)
    begin = fit_procrustes(rows, ProcrustesSettings(centre=settings.centre), dim, seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = {slug: fitted.weight for slug, fitted in begin.items()}
    model = JointMaps(found, weights, settings.temperature).to(device)
    generator = torch.Generator().manual_seed(seed)
    train(model, lambda batch: model.loss(batch, generator), rows, settings, seed)
    return {
        slug: found[slug].map_of(weight.detach().cpu().double())
        for slug, weight in zip(model.slugs, model.weights, strict=True)
    }
