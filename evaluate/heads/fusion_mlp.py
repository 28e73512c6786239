"""One hidden layer over an image feature and a question feature that chooses an answer."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mmkd.base.arrays import Bools, Ints, Singles
from mmkd.evaluate.heads.settings import FusionSettings, Trained
from mmkd.evaluate.heads.torch_training import reproducible, train_until_worse


@dataclass(frozen=True)
class Questions:
    """Questions about images. image, text: float32 (n, D), unit length. answer: int64 (n,), -1 for an unknown one."""

    image: Singles
    text: Singles
    answer: Ints

    def take(self, chosen: Bools) -> "Questions":
        return Questions(self.image[chosen], self.text[chosen], self.answer[chosen])

    def fused(self) -> torch.Tensor:
        """Return both features, their product and their distance, float32 (n, 4 D), scaled to about unit variance."""
        image, text = torch.from_numpy(self.image), torch.from_numpy(self.text)
        scale = float(np.sqrt(image.shape[1]))
        return torch.cat((image, text, image * text * scale, (image - text).abs()), dim=1) * scale


def fit_predict(
    train: Questions, val: Questions, test: Questions, *, words: int, settings: FusionSettings, seed: int
) -> tuple[Ints, Trained]:
    """Train on questions with a known answer, stop by the validation accuracy. Returns the answer of every test
    question, int64 (m,), and the outcome of the training. `words`: size of the vocabulary."""
    known = train.take(train.answer >= 0)
    x, y = known.fused(), torch.from_numpy(known.answer)
    seen, right = val.fused(), torch.from_numpy(val.answer)
    with reproducible(seed):
        head = nn.Sequential(
            nn.Linear(x.shape[1], settings.hidden),
            nn.LayerNorm(settings.hidden),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, words),
        )
        trained = train_until_worse(
            head,
            settings,
            np.arange(len(y)),
            np.random.default_rng(seed),
            lambda chosen: nn.functional.cross_entropy(head(x[chosen]), y[chosen]),
            lambda: float((head(seen).argmax(dim=1) != right).double().mean()),
        )
        with torch.no_grad():
            answers = head(test.fused()).argmax(dim=1)
    return answers.numpy().astype(np.int64), trained
