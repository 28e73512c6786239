"""The autoencoder released with MMKD-CLIP (`open_clip/models_ae.py`, MultiCLIP_AE), by its published description.

Per teacher ``in = Linear(E, D)``, shared by image and text, and ``out = Linear(D, E)``; per tower an encoder and a
decoder of width H between. In training Gaussian noise of 0.01 is added to the encoder's input, dropout is 0.2, and the
loss is the mean squared error of the reconstruction, averaged over (sample, teacher, tower). Its feature is ``in(x)``
alone: the encoder is left out when features are mapped. So the result is one affine map a teacher, and nothing in the
objective brings two teachers together: "common space" means common width only.

Encoders are ``Linear, ReLU, Dropout`` twice over, their end included; decoders are ``Linear, ReLU, Linear``.
"""

from __future__ import annotations

import torch
from torch import nn

from mmkd.distill.alignment.config import AutoencoderSettings
from mmkd.distill.alignment.maps import TeacherMap
from mmkd.distill.alignment.rows import AlignmentRows
from mmkd.distill.alignment.training import Batch, train
from mmkd.store.layout import TOWERS, Tower


class MultiTeacherAutoencoder(nn.Module):
    """Widths: E a teacher's, D the common one, H hidden."""

    def __init__(self, widths: dict[str, int], dim: int, settings: AutoencoderSettings) -> None:
        super().__init__()
        self.slugs = tuple(widths)
        self.noise = settings.noise
        self.inputs = nn.ModuleList(nn.Linear(width, dim) for width in widths.values())
        self.outputs = nn.ModuleList(nn.Linear(dim, width) for width in widths.values())
        hidden, drop = settings.hidden, settings.dropout
        self.encoders = nn.ModuleDict({tower: _encoder(dim, hidden, drop) for tower in TOWERS})
        self.decoders = nn.ModuleDict({tower: _decoder(hidden, dim) for tower in TOWERS})

    def reconstruct(self, slug: str, tower: Tower, features: torch.Tensor) -> torch.Tensor:
        """Features (M, E) of one tower through the whole network and back, (M, E)."""
        index = self.slugs.index(slug)
        latent: torch.Tensor = self.inputs[index](features)
        if self.training and self.noise:
            latent = latent + self.noise * torch.randn_like(latent)
        restored: torch.Tensor = self.outputs[index](self.decoders[tower](self.encoders[tower](latent)))
        return restored

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean over all (sample, teacher, tower) of the mean squared error; 0 when no teacher has a row."""
        total, count = next(self.parameters()).sum() * 0, 0
        for slug in self.slugs:
            part = batch[slug]
            for tower in TOWERS:
                features = part.tower(tower)
                errors = (self.reconstruct(slug, tower, features) - features).square().mean(dim=1)
                total, count = total + errors.sum(), count + len(features)
        return total / max(count, 1)


def _encoder(dim: int, hidden: int, drop: float) -> nn.Sequential:
    layers = [[nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(drop)] for width in (dim, hidden)]
    return nn.Sequential(*layers[0], *layers[1])


def _decoder(hidden: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim))


def fit_autoencoder(rows: AlignmentRows, settings: AutoencoderSettings, dim: int, seed: int) -> dict[str, TeacherMap]:
    """Train it, and keep each teacher's first layer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
