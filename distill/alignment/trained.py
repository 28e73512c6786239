"""Alignments that are trained on features alone: joint maps, and the autoencoder released with MMKD-CLIP."""

import math
from collections.abc import Callable, Generator
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from mmkd.base.errors import UserError
from mmkd.distill.alignment import TeacherMap
from mmkd.distill.alignment.closed_form import Moments, fit_procrustes, moments
from mmkd.distill.alignment.config import AutoencoderSettings, JointSettings, ProcrustesSettings, TrainingSettings
from mmkd.distill.alignment.rows import AlignmentRows, TeacherRows
from mmkd.distill.batches import one_ahead
from mmkd.distill.order import epoch_places
from mmkd.distill.world import local_device
from mmkd.store.layout import TOWERS, Tower

Batch = dict[str, TeacherRows]


def batches(
    rows: AlignmentRows, settings: TrainingSettings, seed: int, device: torch.device
) -> Generator[Batch, None, None]:
    """Yield the batches of all steps; a thread gathers each while the step before runs. A gather releases the
    interpreter lock, so it takes nothing from the step but memory bandwidth."""
    size = min(settings.batch_size, len(rows.fit))
    per_epoch = len(rows.fit) // size

    def gather() -> Generator[Batch, None, None]:
        for step in range(settings.steps):
            epoch, place = divmod(step, per_epoch)
            positions = np.arange(place * size, (place + 1) * size)
            yield rows.gather(rows.fit[epoch_places(positions, len(rows.fit), seed, epoch)], device)

    return one_ahead(gather(), device)


def train(
    model: nn.Module,
    loss_of: Callable[[Batch], torch.Tensor],
    rows: AlignmentRows,
    settings: TrainingSettings,
    seed: int,
) -> None:
    """Minimize `loss_of` over the rows to fit on. Raises UserError if the loss is not finite any more."""
    device = next(model.parameters()).device
    steps = settings.steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    decay = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    for step, batch in enumerate(tqdm(batches(rows, settings, seed, device), total=steps, unit="step", disable=None)):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        decay.step()
        # Reading the loss waits for the device: not in every step.
        if (step % 50 == 0 or step + 1 == steps) and not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at step {step} of {steps}; lower method lr {settings.lr:g}")


class JointMaps(nn.Module):
    """One matrix per teacher; features are centered before it and scaled to norm 1 after it."""

    def __init__(self, found: dict[str, Moments], begin: dict[str, torch.Tensor], temperature: float) -> None:
        super().__init__()
        self.slugs, self.found = tuple(found), found
        self.weights = nn.ParameterList(nn.Parameter(begin[slug].clone()) for slug in found)
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """Return InfoNCE over the rows that two teachers share, for a random ring of teachers. The teachers that have
        rows are put in a random circle, and each is contrasted with the next, images and texts with images and texts. A
        step costs one product per teacher; over the steps every two teachers meet."""
        out: dict[str, dict[Tower, torch.Tensor]] = {}
        for slug, weight in zip(self.slugs, self.weights, strict=True):
            if len(batch[slug].members) > 1:
                means = {tower: mean.float().to(weight.device) for tower, mean in self.found[slug].means.items()}
                maps = {tower: F.linear(batch[slug].tower(tower) - means[tower], weight) for tower in TOWERS}
                out[slug] = {tower: F.normalize(mapped, dim=-1) for tower, mapped in maps.items()}
        present = [list(out)[i] for i in torch.randperm(len(out), generator=generator).tolist()]
        terms = []
        for one, other in zip(present, [*present[1:], *present[:1]], strict=True):
            mine, theirs = batch[one].members, batch[other].members
            a, b = torch.isin(mine, theirs), torch.isin(theirs, mine)
            if (shared := int(a.sum())) < 2:
                continue
            for tower, against in product(TOWERS, TOWERS):
                if one == other and tower == against:
                    continue  # a teacher alone: its images with its texts, and not with themselves
                logits = self.log_scale.exp() * out[one][tower][a] @ out[other][against][b].T
                target = torch.arange(shared, device=logits.device)
                terms.append((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2)
        return torch.stack(terms).mean() if terms else self.log_scale * 0


def fit_joint(rows: AlignmentRows, settings: JointSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """Train the maps, beginning with Procrustes rotations; equal captions in a batch are negatives of each other."""
    found = moments(rows, settings.center)
    begin = fit_procrustes(rows, ProcrustesSettings(center=settings.center), dim, seed)
    device = local_device()
    weights = {slug: fitted.weight for slug, fitted in begin.items()}
    model = JointMaps(found, weights, settings.temperature).to(device)
    generator = torch.Generator().manual_seed(seed)
    train(model, lambda batch: model.loss(batch, generator), rows, settings, seed)
    return {
        slug: found[slug].map_of(weight.detach().cpu().double())
        for slug, weight in zip(model.slugs, model.weights, strict=True)
    }


class MultiTeacherAutoencoder(nn.Module):
    """MMKD-CLIP's autoencoder (`open_clip/models_ae.py`, MultiCLIP_AE). E: a teacher's width, D the common, H hidden.
    Per teacher ``in = Linear(E, D)``, shared by image and text, and ``out = Linear(D, E)``; per tower an encoder
    (``Linear, ReLU, Dropout`` twice) and a decoder (``Linear, ReLU, Linear``) of width H between. In training Gaussian
    noise of 0.01 is added to the encoder's input, dropout is 0.2, and the loss is the mean squared error of the
    reconstruction, averaged over (sample, teacher, tower). Its feature is ``in(x)`` alone, so the result is one affine
    map per teacher. No term compares two teachers: they get a common width, not a common space."""

    def __init__(self, widths: dict[str, int], dim: int, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.slugs = tuple(widths)
        self.noise = settings.noise
        self.inputs = nn.ModuleList(nn.Linear(width, dim) for width in widths.values())
        self.outputs = nn.ModuleList(nn.Linear(dim, width) for width in widths.values())
        hidden, drop = settings.hidden, settings.dropout
        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        for tower in TOWERS:
            layers = [[nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(drop)] for width in (dim, hidden)]
            self.encoders[tower] = nn.Sequential(*layers[0], *layers[1])
        for tower in TOWERS:
            self.decoders[tower] = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean over (sample, teacher, tower) of the mean squared error; 0 when no teacher has a row."""
        total, count = next(self.parameters()).sum() * 0, 0
        for slug, enter, leave in zip(self.slugs, self.inputs, self.outputs, strict=True):
            for tower in TOWERS:
                features = batch[slug].tower(tower)
                latent = enter(features)
                if self.training and self.noise:
                    latent = latent + self.noise * torch.randn_like(latent)
                restored = leave(self.decoders[tower](self.encoders[tower](latent)))
                errors = (restored - features).square().mean(dim=1)
                total, count = total + errors.sum(), count + len(features)
        return total / max(count, 1)


def fit_autoencoder(rows: AlignmentRows, settings: AutoencoderSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """Train the autoencoder, and return each teacher's first layer."""
    device = local_device()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MultiTeacherAutoencoder(rows.widths, dim, settings).to(device)
        train(model, model.loss, rows, settings, seed)
    maps = {}
    for slug, layer in zip(model.slugs, model.inputs, strict=True):
        assert isinstance(layer, nn.Linear)
        weight, bias = layer.weight.detach().cpu(), layer.bias.detach().cpu()
        maps[slug] = TeacherMap(weight, bias, bias.clone())
    return maps
