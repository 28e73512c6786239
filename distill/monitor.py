"""Validation during training: retrieval and zero-shot classification on held-out rows, never on report sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from mmkd.distill.captions import Captions
from mmkd.distill.config import MonitorConfig
from mmkd.distill.images import image_batches
from mmkd.distill.losses import unit
from mmkd.distill.optimizer import WeightAverage
from mmkd.distill.student import Towers, plain_pixels
from mmkd.distill.validation_sets import HeldOut
from mmkd.distill.world import World

_QUERIES_AT_ONCE = 1024


@dataclass(kw_only=True)
class Monitor:
    """All held-out sets of a run, and the weights that are judged."""

    config: MonitorConfig
    sets: list[HeldOut]
    towers: Towers
    average: WeightAverage | None
    """Judged in place of the towers' own weights, where there is one."""
    batch_rows: int
    """Images or captions of one forward pass."""
    workers: int
    """Processes that read images."""
    world: World

    @property
    def judge(self) -> str:
        """The metric that chooses the best checkpoint, and a digest of the rows that it looks at; may be empty."""
        metric = self.config.chosen_metric
        digests = [held.rows.digest for held in self.sets if metric in held.rows.metrics]
        return f"{metric} {digests[0]}" if digests else ""

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Return every metric of every set by `SET/METRIC`, in [0, 1], higher is better; the same on every rank."""
        found: dict[str, float] = {}
        training = self.towers.training
        with _use_average(self.towers, self.average):
            self.world.share_buffers(self.towers)
            self.towers.eval()
            for held in self.sets:
                found |= self._judge(held)
        self.towers.train(training)
        return found

    def _judge(self, held: HeldOut) -> dict[str, float]:
        images = self._encode_images(held)
        if held.prompts is None:
            groups = torch.from_numpy(held.rows.pairs.caption)
            texts = self._encode_texts(held.captions)[groups]
            ranks = torch.cat([positive_ranks(images, texts, groups), positive_ranks(texts, images, groups)])
            return {name: (ranks < k).float().mean().item() for name, k in zip(held.rows.metrics, (1, 5), strict=True)}
        prompts = self._encode_texts(held.prompts)
        classes = int(held.prompt_labels.max()) + 1
        sums = torch.zeros(classes, prompts.shape[1]).index_add_(0, held.prompt_labels, prompts)
        predicted = (images @ unit(sums).T).argmax(dim=1)
        present = [held.labels == label for label in torch.unique(held.labels)]
        recalls = [(predicted[mine] == held.labels[mine]).float().mean() for mine in present]
        return {held.rows.metrics[0]: torch.stack(recalls).mean().item()}

    def _encode_images(self, held: HeldOut) -> torch.Tensor:
        """Return float32 (n, D) of unit norm, on the CPU; every rank encodes its share."""
        rows = held.rows.pairs.rows
        padded = np.resize(rows, -(-len(rows) // self.world.size) * self.world.size)
        mine = padded.reshape(self.world.size, -1)[self.world.rank]
        parts = np.split(mine, range(self.batch_rows, len(mine), self.batch_rows))
        plain = plain_pixels(self.towers.student)
        pixels = image_batches(held.images, plain, ((0, part) for part in parts), 0, self.workers)
        found = [unit(self.towers.encode_images(images.to(self.world.device))) for images in pixels]
        return self.world.gather(torch.cat(found)).cpu()[: len(rows)]

    def _encode_texts(self, captions: Captions) -> torch.Tensor:
        """Return float32 (u, D) of unit norm, on the CPU."""
        numbers = np.arange(len(captions.lengths))
        parts = np.split(numbers, range(self.batch_rows, len(numbers), self.batch_rows))
        tokens = (captions.tokens(part) for part in parts)
        return torch.cat([unit(self.towers.encode_tokens(part.to(self.world.device))).cpu() for part in tokens])


def positive_ranks(queries: torch.Tensor, gallery: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return how many wrong answers are at least as near as the nearest right one: int64 (n,), 0 is best. `queries`,
    `gallery`: float32 (n, D) of unit norm. groups: int64 (n,); an answer is right when its group is equal."""
    ranks = []
    for chunk, mine in zip(*(torch.split(part, _QUERIES_AT_ONCE) for part in (queries, groups)), strict=True):
        cosine = chunk @ gallery.T
        right = mine[:, None] == groups[None, :]
        nearest = cosine.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((cosine >= nearest) & ~right).sum(dim=1))
    return torch.cat(ranks)


@contextmanager
def _use_average(towers: Towers, average: WeightAverage | None) -> Iterator[None]:
    """Give the towers their averaged weights inside the block."""
    if average is None:
        yield
        return
    own = {name: value.detach().clone() for name, value in towers.state_dict().items()}
    towers.load_state_dict(average.values)
    try:
        yield
    finally:
        towers.load_state_dict(own)
