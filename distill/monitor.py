"""Validation during training: retrieval and zero-shot classification on held-out rows, never on report sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from mmkd.distill.captions import Captions
from mmkd.distill.config import MonitorConfig
from mmkd.distill.images import RowImages, image_batches
from mmkd.distill.losses import unit
from mmkd.distill.optimizer import WeightAverage
from mmkd.distill.pairs import Pairs
from mmkd.distill.student import Pixels, Towers
from mmkd.distill.world import World

_QUERIES_AT_ONCE = 1024


@dataclass(frozen=True)
class HeldOut:
    """One set of rows to be judged on.

    labels: int64 (n,), class of each pair, or None for retrieval. prompt_labels: int64 (p,), class of each prompt.
    """

    name: str
    pairs: Pairs
    captions: Captions
    images: RowImages
    digest: str
    """Of the rows, their images and captions, wherever their store lies."""
    labels: torch.Tensor | None = None
    prompts: Captions | None = None
    prompt_labels: torch.Tensor | None = None

    @property
    def metrics(self) -> list[str]:
        """Names of the set's metrics, the first one first."""
        return [f"{self.name}/{metric}" for metric in (("recall@1", "recall@5") if self.labels is None else ("bacc",))]


@dataclass
class Monitor:
    """All held-out sets of a run, and the weights that are judged."""

    config: MonitorConfig
    sets: list[HeldOut]
    towers: Towers
    average: WeightAverage | None
    pixels: Pixels
    batch_rows: int
    workers: int
    world: World

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics."""
        return [metric for held in self.sets for metric in held.metrics]

    @property
    def metric(self) -> str:
        """The score that decides; empty when nothing is judged."""
        return self.config.metric or next(iter(self.metrics), "")

    @property
    def judge(self) -> str:
        """What chooses the best checkpoint: the metric, and a digest of the rows that it looks at; may be empty."""
        held = next((held for held in self.sets if self.metric in held.metrics), None)
        return f"{self.metric} {held.digest}" if held is not None else ""

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Every metric of every set by `SET/METRIC`, in [0, 1], higher is better; the same on every rank."""
        found: dict[str, float] = {}
        training = self.towers.training
        with _averaged(self.towers, self.average):
            self.world.share_buffers(self.towers)
            self.towers.eval()
            for held in self.sets:
                found |= self._judge(held)
        self.towers.train(training)
        return found

    def _judge(self, held: HeldOut) -> dict[str, float]:
        images = self._images(held)
        if held.labels is None:
            groups = torch.from_numpy(held.pairs.caption)
            texts = self._texts(held.captions)[groups]
            ranks = torch.cat([positive_ranks(images, texts, groups), positive_ranks(texts, images, groups)])
            return {f"{held.name}/recall@{k}": (ranks < k).float().mean().item() for k in (1, 5)}
        assert held.prompts is not None
        assert held.prompt_labels is not None
        prompts = self._texts(held.prompts)
        classes = int(held.prompt_labels.max()) + 1
        sums = torch.zeros(classes, prompts.shape[1]).index_add_(0, held.prompt_labels, prompts)
        predicted = (images @ unit(sums).T).argmax(dim=1)
        present = [held.labels == label for label in torch.unique(held.labels)]
        recalls = [(predicted[mine] == held.labels[mine]).float().mean() for mine in present]
        return {f"{held.name}/bacc": torch.stack(recalls).mean().item()}

    def _images(self, held: HeldOut) -> torch.Tensor:
        """float32 (n, D) of unit norm, on the CPU; every rank encodes its share."""
        rows = held.pairs.rows
        padded = np.resize(rows, -(-len(rows) // self.world.size) * self.world.size)
        mine = padded.reshape(self.world.size, -1)[self.world.rank]
        parts = np.split(mine, range(self.batch_rows, len(mine), self.batch_rows))
        pixels = image_batches(held.images, self.pixels, ((0, part) for part in parts), 0, self.workers)
        found = [unit(self.towers.encode_images(images.to(self.world.device))) for images in pixels]
        return self.world.gather(torch.cat(found)).cpu()[: len(rows)]

    def _texts(self, captions: Captions) -> torch.Tensor:
        """float32 (u, D) of unit norm, on the CPU."""
        numbers = np.arange(len(captions.lengths))
        parts = np.split(numbers, range(self.batch_rows, len(numbers), self.batch_rows))
        tokens = (captions.tokens(part) for part in parts)
        return torch.cat([unit(self.towers.encode_tokens(part.to(self.world.device))).cpu() for part in tokens])


def positive_ranks(queries: torch.Tensor, gallery: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """How many wrong answers are at least as near as the nearest right one: int64 (n,), 0 is best.

    Args:
        queries, gallery: float32 (n, D) of unit norm. groups: int64 (n,); an answer is right when its group is equal.
    """
    ranks = []
    for chunk, mine in zip(*(torch.split(part, _QUERIES_AT_ONCE) for part in (queries, groups)), strict=True):
        cosine = chunk @ gallery.T
        right = mine[:, None] == groups[None, :]
        nearest = cosine.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((cosine >= nearest) & ~right).sum(dim=1))
    return torch.cat(ranks)


def numbered(values: list[str], classes: list[str]) -> torch.Tensor:
    """int64 (n,): place of every value among the classes."""
    place = {name: number for number, name in enumerate(classes)}
    return torch.tensor([place[value] for value in values], dtype=torch.long)


@contextmanager
def _averaged(towers: Towers, average: WeightAverage | None) -> Iterator[None]:
    """The towers with their averaged weights."""
    if average is None:
        yield
        return
    own = {name: value.detach().clone() for name, value in towers.state_dict().items()}
    towers.load_state_dict(average.values)
    try:
        yield
    finally:
        towers.load_state_dict(own)
