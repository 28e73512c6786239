"""Cross-modal retrieval: find an image's caption among all captions, and a caption's image among all images."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.arrays import Bools, Floats, Ints, Objects, Singles
from mmkd.evaluate.dataset import DatasetRows, Samples
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import recall_at, weighted_mean, weighted_median
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.scoring import Metric, Scoring
from mmkd.evaluate.splits import subgroups_of
from mmkd.evaluate.task import Task, TaskSettings, Variant, without_features
from mmkd.store import UserError
from mmkd.store.layout import Tower

TIE = 1e-6
"""Cosines closer than this are equal. The product of two float32 vectors depends on where they stand in a matrix:
equal gallery rows had different cosines in 19 of 80 products measured (128 to 1152 wide), by up to 3e-8, and rounding
errors reach 1.2e-7. Exact comparison would break true ties (duplicate images or captions) at random."""
CHUNK_ELEMENTS = 1 << 24
"""Scores held at a time: 64 MiB of float32."""


class RetrievalSettings(TaskSettings):
    """Cross-modal retrieval in both directions."""

    ks: tuple[int, ...] = (1, 5, 10, 50)
    positives: Literal["pair", "image", "image+caption"] = "image+caption"
    """Rule for positives. `pair`: only the caption of the same row. `image`: any caption of the same image bytes.
    `image+caption`: also any image with the same normalized caption; queries and gallery hold each only once."""

    def faults(self) -> Iterator[str]:
        if not self.ks or min(self.ks) < 1:
            yield f"ks must be one or more ranks from 1 on, got {list(self.ks)}"


class Retrieval(Task[RetrievalSettings]):
    """R@k, median rank and true recall in both directions. An ensemble averages its members' cosines."""

    name = "retrieval"
    version = 2
    settings = RetrievalSettings

    def towers(self, spec: DatasetSpec) -> tuple[Tower, ...]:
        return ("image", "text")

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        return (Variant(head="i2t"), Variant(head="t2i"))

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        own = self.own(spec)
        metrics = {f"r@{k}": Metric(partial(_recall, column="rank", k=k), mean=True) for k in own.ks}
        metrics |= {f"recall@{k}": Metric(partial(_recall, column=f"found@{k}", k=k), mean=True) for k in own.ks}
        metrics["medr"] = Metric(
            lambda found, weights: weighted_median(found.column("rank") + 1, weights), lower=True, share=False
        )
        metrics["tie_rate"] = Metric(
            lambda found, weights: weighted_mean(found.column("ties") > 0, weights), lower=True, mean=True
        )
        return Scoring(own.positives, metrics, f"r@{own.ks[0]}")

    def problems(self, data: DatasetRows) -> list[str]:
        test = data.split("test")
        try:
            pairs = find_pairs(test, self.own(data.spec).positives)
        except UserError as error:
            return [f"{data.spec.dataset}: {error}"]
        return [] if len(pairs.captions) > 1 else [f"{data.spec.dataset}: only one caption to retrieve"]

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Rank from 0 of the best positive, ties with it, and the share of positives found, of every query."""
        test, settings = data.split("test"), self.own(data.spec)
        pairs = find_pairs(test, settings.positives)
        forward = variant.head == "i2t"
        images, texts = features.images(test.rows[pairs.images]), features.texts(test.rows[pairs.captions])
        queries, gallery = (images, texts) if forward else (texts, images)
        query_rows, gallery_rows = (pairs.images, pairs.captions) if forward else (pairs.captions, pairs.images)
        right, size = pairs.positives(forward, gallery.available), int(gallery.available.sum())
        there = queries.available
        score = np.full((len(query_rows), 2 + len(settings.ks)), np.nan)
        score[there] = rank_positives(
            queries.values[there],
            gallery.values[gallery.available],
            [right[i] for i in np.flatnonzero(there)],
            settings.ks,
        )
        trivial = f"has no value: any answer is among the first {{}} of a gallery of {size}"
        groups = data.groups(test) if data.spec.group is not None else test.filled("image_sha256", test.ids)
        return Predictions(
            ids=test.ids[query_rows],
            group=groups[query_rows],
            domain=data.domains(test)[query_rows],
            y=None,
            score=score,
            available=~np.isnan(score[:, 0]),
            columns=("rank", "ties", *(f"found@{k}" for k in settings.ks)),
            info={
                "positives": settings.positives,
                "gallery": size,
                "gallery_missing": len(gallery_rows) - size,
                "pairs": len(pairs.image_of_row),
                "choices": choices_digest(test.ids[gallery_rows[gallery.available]]),
                "undefined": {
                    f"{name}@{k}": trivial.format(k) for k in settings.ks if k >= size for name in ("r", "recall")
                },
                "warnings": without_features(size, len(gallery_rows), "gallery items"),
            },
            subgroups={name: values[query_rows] for name, values in subgroups_of(data, test.column).items()},
        )


@dataclass(frozen=True)
class Pairs:
    """Distinct images and captions, and which belong together. images: int64 (I,), captions: int64 (C,), the first row
    of every distinct one. image_of_row, caption_of_row: int64 (P,), indices of these for every row that has both."""

    images: Ints
    captions: Ints
    image_of_row: Ints
    caption_of_row: Ints

    def positives(self, forward: bool, available: Bools) -> list[Ints]:
        """Right answers of every query, as positions among the `available` gallery items, bool (m,). `forward`: images
        ask for captions; otherwise captions ask for images."""
        sides = ((self.images, self.image_of_row), (self.captions, self.caption_of_row))
        (queries, query), (_, answer) = sides if forward else sides[::-1]
        usable, place = available[answer], np.cumsum(available) - 1
        pairs = np.unique(np.column_stack([query[usable], place[answer[usable]]]), axis=0)
        return np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, len(queries))))


def find_pairs(test: Samples, rule: str) -> Pairs:
    """Return matching images and captions by `RetrievalSettings.positives`, of rows that have both. Raises UserError if
    there is none, or a row has no image digest although the rule needs it."""
    digests = test.column("image_sha256")
    texts = np.array([normalized(caption) for caption in test.column("caption")], dtype=object)
    has_image = test.column("uri") != None  # noqa: E711 - element by element
    whole = np.flatnonzero((texts != "") & has_image & (test.column("status") == "ok"))
    if len(whole) == 0:
        raise UserError("no test row has both an image and a caption")
    if rule != "pair" and any(digests[i] is None for i in whole):
        raise UserError(f"positives: {rule} needs digests of images, which some test rows lack; use `positives: pair`")
    first_images, image_of_row = _distinct(test.ids if rule == "pair" else digests, whole)
    first_captions, caption_of_row = _distinct(texts if rule == "image+caption" else test.ids, whole)
    return Pairs(first_images, first_captions, image_of_row, caption_of_row)


def normalized(caption: str | None) -> str:
    """Lower case, runs of white space as one blank, no blanks or full stops at the ends."""
    return re.sub(r"\s+", " ", caption or "").strip(" .").lower()


def _distinct(names: Objects, rows: Ints) -> tuple[Ints, Ints]:
    """Return the first row of every distinct name, in order of appearance, and the index of each row's name."""
    index = pa.array(names[rows].tolist(), pa.string()).dictionary_encode().indices.to_numpy().astype(np.int64)
    return rows[np.unique(index, return_index=True)[1]], index


def rank_positives(queries: Singles, gallery: Singles, positives: list[Ints], ks: tuple[int, ...]) -> Floats:
    """Rank the positives of queries float32 (n, D) in a gallery float32 (m, D) by inner product, as `rank_scores`."""
    ranks = np.full((len(queries), 2 + len(ks)), np.nan)
    step = max(1, CHUNK_ELEMENTS // max(1, len(gallery)))
    for start in range(0, len(queries), step):
        part = slice(start, start + step)
        ranks[part] = rank_scores(queries[part] @ gallery.T, positives[part], ks)
    return ranks


def rank_scores(scores: NDArray[np.floating], positives: list[Ints], ks: tuple[int, ...]) -> Floats:
    """Rank the positives of every query, gallery indices, in a score matrix (n, m). The rank (from 0) of a positive is
    the number of negatives that score at least as high: a model that gives one score to all finds nothing. Result:
    float64 (n, 2 + len(ks)): the rank of the best positive, the negatives that score like it, and the share of
    positives among the first k for each k; NaN for a query without positives."""
    ranks = np.full((len(scores), 2 + len(ks)), np.nan)
    for i, (row, right) in enumerate(zip(scores, positives, strict=True)):
        if len(right) == 0:
            continue
        negatives, own = np.delete(row, right), np.sort(row[right])[::-1]
        ahead = np.array([np.count_nonzero(negatives >= score - TIE) for score in own])
        # The j-th best positive stands behind j positives and all negatives that are not below it.
        places = ahead + np.arange(len(own))
        ties = np.count_nonzero(np.abs(negatives - own[0]) <= TIE)
        ranks[i] = ahead[0], ties, *((places < k).mean() for k in ks)
    return ranks


def _recall(predictions: Predictions, weights: Floats, column: str, k: int) -> Floats:
    """Return R@k from ranks, or true recall from shares; NaN where the gallery is no larger than k."""
    if k >= predictions.info["gallery"]:
        return np.full(len(weights), np.nan)
    values = predictions.column(column)
    return recall_at(values, k, weights) if column == "rank" else weighted_mean(values, weights)
