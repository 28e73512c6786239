"""Cross-modal retrieval: find an image's caption among all captions, and a caption's image among all images."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from mmkd.evaluate.dataset import DatasetRows, Samples
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.metrics import Floats
from mmkd.evaluate.predictions import Predictions, choices_digest
from mmkd.evaluate.ranking import rank_positives, recall_at, weighted_mean, weighted_median
from mmkd.evaluate.task import Metric, Scoring, Task, TaskSettings, Variant, without_features
from mmkd.store import UserError
from mmkd.store.layout import Tower

IMAGE_TO_TEXT = "i2t"
TEXT_TO_IMAGE = "t2i"


class RetrievalSettings(TaskSettings):
    """Cross-modal retrieval in both directions."""

    ks: tuple[int, ...] = (1, 5, 10, 50)
    positives: Literal["pair", "image", "image+caption"] = "image+caption"
    """Rule for positives. `pair`: only the caption of the same row. `image`: any caption of the same image bytes.
    `image+caption`: also any image with the same normalized caption; queries and gallery hold each only once."""

    @model_validator(mode="after")
    def _ks_are_ranks(self) -> RetrievalSettings:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"ks must be one or more ranks from 1 on, got {list(self.ks)}")
        return self


class Retrieval(Task[RetrievalSettings]):
    """R@k, median rank and true recall in both directions. An ensemble averages its members' cosines."""

    name = "retrieval"
    version = 2
    settings = RetrievalSettings

    def towers(self, spec: DatasetSpec) -> tuple[Tower, ...]:
        """Return images and captions."""
        return ("image", "text")

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        """Return one for each direction."""
        return (Variant(head=IMAGE_TO_TEXT), Variant(head=TEXT_TO_IMAGE))

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """R@k and true recall at every cut-off, median rank from 1, share of queries with a tied best positive."""
        own = self.own(spec)
        metrics: dict[str, Metric] = {f"r@{k}": partial(_hit, k=k) for k in own.ks}
        metrics |= {f"recall@{k}": partial(_found, k=k) for k in own.ks}
        metrics |= {"medr": _median_rank, "tie_rate": _tie_rate}
        return Scoring(
            protocol=own.positives,
            metrics=metrics,
            primary=f"r@{own.ks[0]}",
            lower_is_better=frozenset({"medr", "tie_rate"}),
            not_shares=frozenset({"medr"}),
            proportions=frozenset(metrics) - {"medr"},
        )

    def problems(self, data: DatasetRows) -> list[str]:
        """There must be two captions to choose from, and image digests where positives need them."""
        try:
            test = data.split("test")
        except UserError as error:
            return [str(error)]  # it names the set, and other tasks say the same
        try:
            pairs = find_pairs(test, self.own(data.spec).positives)
        except UserError as error:
            return [f"{data.spec.dataset}: {error}"]
        return [] if len(pairs.captions) > 1 else [f"{data.spec.dataset}: only one caption to retrieve"]

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Rank from 0 of the best positive, ties with it, and the share of positives found, of every query."""
        test = data.split("test")
        settings = self.own(data.spec)
        pairs = find_pairs(test, settings.positives)
        images = features.images(test.rows[pairs.images])
        texts = features.texts(test.rows[pairs.captions])
        forward = variant.head == IMAGE_TO_TEXT
        queries, gallery = (images, texts) if forward else (texts, images)
        query_rows = pairs.images if forward else pairs.captions
        right = pairs.positives(forward, gallery.available)
        ranked = rank_positives(
            queries.values[queries.available],
            gallery.values[gallery.available],
            [right[i] for i in np.flatnonzero(queries.available)],
            settings.ks,
        )
        score = np.full((len(query_rows), 2 + len(settings.ks)), np.nan)
        score[queries.available] = np.column_stack([ranked.best, ranked.ties, ranked.found])
        size = int(gallery.available.sum())
        gallery_rows = pairs.captions if forward else pairs.images
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
                "gallery_missing": len(gallery.available) - size,
                "pairs": len(pairs.image_of_row),
                "choices": choices_digest(test.ids[gallery_rows[gallery.available]]),
                "undefined": {
                    f"{name}@{k}": trivial.format(k) for k in settings.ks if k >= size for name in ("r", "recall")
                },
                "warnings": without_features(size, len(gallery.available), "gallery items"),
            },
        )


@dataclass(frozen=True)
class Pairs:
    """Distinct images and captions of n rows, and which belong together. images: int64 (I,), first row of every
    distinct image; captions: int64 (C,), of every distinct caption. image_of_row, caption_of_row: int64 (P,), index of
    the image and the caption of every row that has both."""

    images: NDArray[np.int64]
    captions: NDArray[np.int64]
    image_of_row: NDArray[np.int64]
    caption_of_row: NDArray[np.int64]

    def positives(self, forward: bool, available: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
        """For every query its right answers, as positions among the available gallery items. `forward`: images ask for
        captions; otherwise captions ask for images. `available`: bool, of every gallery item."""
        query, answer = (
            (self.image_of_row, self.caption_of_row) if forward else (self.caption_of_row, self.image_of_row)
        )
        place = np.cumsum(available) - 1
        usable = available[answer]
        pairs = np.unique(np.column_stack([query[usable], place[answer[usable]]]), axis=0)
        count = len(self.images if forward else self.captions)
        return np.split(pairs[:, 1], np.searchsorted(pairs[:, 0], np.arange(1, count)))


def find_pairs(test: Samples, rule: str) -> Pairs:
    """Return matching images and captions of a split by `RetrievalSettings.positives`. Rows without a caption or image
    take no part. Raises UserError if no row has both, or a row has no image digest although the rule needs it."""
    captions = test.column("caption")
    digests = test.column("image_sha256")
    texts = np.array([normalized(caption) for caption in captions], dtype=object)
    has_image = np.array([uri is not None for uri in test.column("uri")], dtype=bool)
    whole = np.flatnonzero((texts != "") & has_image & (test.column("status") == "ok"))
    if len(whole) == 0:
        raise UserError("no test row has both an image and a caption")
    if rule != "pair" and any(digests[i] is None for i in whole):
        raise UserError(
            f"positives: {rule} tells images apart by their digest, which some test rows lack; use `positives: pair`"
        )
    caption_names = texts if rule == "image+caption" else test.ids
    first_images, image_of_row = _first_and_index(test.ids if rule == "pair" else digests, whole)
    first_captions, caption_of_row = _first_and_index(caption_names, whole)
    return Pairs(first_images, first_captions, image_of_row, caption_of_row)


def normalized(caption: str | None) -> str:
    """Lower case, runs of white space as one blank, no blanks or full stops at the ends."""
    return re.sub(r"\s+", " ", caption or "").strip(" .").lower()


def _first_and_index(
    names: NDArray[np.object_], rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return first row of every distinct name, in order of appearance, and the index of each row's name."""
    seen: dict[str, int] = {}
    first: list[int] = []
    index = []
    for row in rows.tolist():
        name = names[row]
        if name not in seen:
            seen[name] = len(first)
            first.append(row)
        index.append(seen[name])
    return np.array(first, dtype=np.int64), np.array(index, dtype=np.int64)


def _hit(predictions: Predictions, weights: Floats, k: int) -> Floats:
    if k >= predictions.info["gallery"]:
        return np.full(len(weights), np.nan)
    return recall_at(predictions.column("rank"), k, weights)


def _found(predictions: Predictions, weights: Floats, k: int) -> Floats:
    if k >= predictions.info["gallery"]:
        return np.full(len(weights), np.nan)
    return weighted_mean(predictions.column(f"found@{k}"), weights)


def _median_rank(predictions: Predictions, weights: Floats) -> Floats:
    return weighted_median(predictions.column("rank") + 1, weights)


def _tie_rate(predictions: Predictions, weights: Floats) -> Floats:
    return weighted_mean((predictions.column("ties") > 0).astype(np.float64), weights)


TASK = Retrieval()
