"""Gated attention over a bag of patches: the network, and its training for classes, hazards or risks. Ilse, Tomczak and
Welling 2018, "Attention-based deep multiple instance learning", equation 9, after one linear layer as CLAM has it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from mmkd.base.arrays import Floats, Ints
from mmkd.evaluate.features import BagFeatures
from mmkd.evaluate.heads.settings import MilSettings, Trained
from mmkd.evaluate.heads.torch_training import reproducible, train_until_worse
from mmkd.evaluate.splits import Round


class GatedAttention(nn.Module):
    """Bags of patch features, multiplied by `scale`, to K outputs each."""

    def __init__(self, dim: int, outputs: int, settings: MilSettings, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.embed = nn.Sequential(nn.Linear(dim, settings.hidden), nn.ReLU(), nn.Dropout(settings.dropout))
        self.tanh = nn.Sequential(nn.Linear(settings.hidden, settings.attention), nn.Tanh())
        self.gate = nn.Sequential(nn.Linear(settings.hidden, settings.attention), nn.Sigmoid())
        self.score = nn.Linear(settings.attention, 1)
        self.head = nn.Linear(settings.hidden, outputs)

    def forward(self, patches: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Outputs of several bags, float32 (len(sizes), K), from the patches of all, float32 (P, D); sizes above 0."""
        hidden = self.embed(patches * self.scale)
        scores = self.score(self.tanh(hidden) * self.gate(hidden)).squeeze(1)
        pooled = [
            torch.softmax(score, dim=0) @ part
            for score, part in zip(scores.split(sizes), hidden.split(sizes), strict=True)
        ]
        outputs: torch.Tensor = self.head(torch.stack(pooled))
        return outputs


class MilTask(NamedTuple):
    """Objective of a network: its number of outputs, and the loss of outputs (b, K) of the bags with these indices."""

    outputs: int
    loss: Callable[[torch.Tensor, Ints], torch.Tensor]


def classify_task(y: Ints, classes: int) -> MilTask:
    """Cross-entropy over classes; `y` is int64 (n,), the class of every bag."""
    labels = torch.from_numpy(y)
    return MilTask(classes, lambda outputs, chosen: nn.functional.cross_entropy(outputs, labels[chosen]))


def fit_predict(
    bags: BagFeatures, task: MilTask, one: Round, *, settings: MilSettings, seed: int
) -> tuple[Floats, Trained]:
    """Train on the training bags of a round, stop by its validation bags, and answer for its test bags. Returns outputs
    float64 (len(one.test), K), and the outcome of the training."""
    rng = np.random.default_rng(seed)
    with reproducible(seed):
        # A mean square of one over (up to 64) training bags: no encoder trains faster because its vectors are longer.
        squares = [np.square(bags.patches(bag), dtype=np.float64).mean(axis=1) for bag in one.train[:64].tolist()]
        scale = float(1 / np.sqrt(np.concatenate(squares).mean()))
        network = GatedAttention(bags.patches(int(one.train[0])).shape[1], task.outputs, settings, scale)

        def outputs(chosen: Ints) -> torch.Tensor:
            parts = [chosen[start : start + settings.batch] for start in range(0, len(chosen), settings.batch)]
            return torch.cat([network(*_batch(bags, part)) for part in parts])

        trained = train_until_worse(
            network,
            settings,
            one.train,
            rng,
            lambda chosen: task.loss(network(*_batch(bags, chosen, settings.max_patches, rng)), chosen),
            lambda: float(task.loss(outputs(one.val), one.val)),
        )
        with torch.no_grad():
            answers = outputs(one.test)
    return answers.double().numpy(), trained


def _batch(
    bags: BagFeatures, chosen: Ints, most: int | None = None, rng: np.random.Generator | None = None
) -> tuple[torch.Tensor, list[int]]:
    """Return patches of bags and their sizes; of a bag with more than `most`, that many drawn at random."""
    patches = []
    for bag in chosen.tolist():
        size = len(bags.bags.members[bag])
        drawn = rng.permutation(size)[:most] if rng is not None and most is not None and size > most else None
        found = bags.patches(bag, drawn)
        patches.append(found if len(found) else bags.patches(bag))
    return torch.from_numpy(np.concatenate(patches)), [len(part) for part in patches]
