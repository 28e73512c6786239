"""Which test images a model may have seen: copies in a training corpus, in other splits, and inside a split.

Exact copies have the same encoded bytes (SHA-256 of the sample table). Near copies are images whose features by one
encoder have a cosine of at least a stated threshold: a resaved, resized or slightly cropped copy, or a neighbouring
slice. A threshold is a choice, so the report shows how near the nearest neighbours are in general.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mmkd.evaluate.dataset import DatasetRows, Samples, load_dataset
from mmkd.evaluate.features import Features
from mmkd.evaluate.neighbours import BLOCK, nearest
from mmkd.evaluate.suite import Suite
from mmkd.store import FeatureStore, UserError
from mmkd.store.errors import TeacherMismatchError

NEAR = 0.98
"""Default cosine from which two images are reported as near copies."""
SHOWN = 3
"""Pairs that the text shows of each comparison; JSON has all."""
TRAINING = "training corpus"


@dataclass(frozen=True)
class Pair:
    """A row of an evaluation set and its copy."""

    key: str
    other: str
    kind: Literal["exact", "near"]
    cosine: float | None
    """None for exact copies."""


@dataclass(frozen=True)
class Overlap:
    """Rows of one split that have a copy in another place.

    images: rows with an image. featured: those whose features could be compared. exact, near: rows with a copy; a row
    with an exact copy is not counted as near. median, highest: cosine to the nearest neighbour that is no exact copy.
    """

    dataset: str
    split: str
    against: str
    images: int
    featured: int
    exact: int
    near: int
    median: float | None
    highest: float | None
    pairs: tuple[Pair, ...]

    @property
    def found(self) -> bool:
        """Whether there is any copy."""
        return self.exact + self.near > 0


@dataclass(frozen=True)
class LeakageReport:
    """All comparisons of a suite."""

    suite: str
    model: str
    cosine: float
    training: str | None
    overlaps: tuple[Overlap, ...]

    @property
    def clean(self) -> bool:
        """Whether no copy was found anywhere."""
        return not any(one.found for one in self.overlaps)

    def text(self) -> str:
        """One line a comparison, and the worst pairs under it."""
        lines = [
            f"suite {self.suite}: exact copies by SHA-256, near copies by cosine >= {self.cosine:g} of {self.model}, "
            + (f"training corpus {self.training}" if self.training else "no training corpus named")
        ]
        for one in self.overlaps:
            place = "inside (other groups)" if one.against == one.split else f"in {one.against}"
            scale = "" if one.median is None else f"; nearest: median {one.median:.3f}, highest {one.highest:.3f}"
            lines.append(
                f"{one.dataset} {one.split} {place}: {one.exact} exact, {one.near} near of {one.images} images{scale}"
            )
            if one.featured < one.images:
                lines.append(f"  {one.images - one.featured} images have no features and were compared by bytes alone")
            for pair in one.pairs[:SHOWN]:
                cosine = "" if pair.cosine is None else f" {pair.cosine:.4f}"
                lines.append(f"  {pair.kind}{cosine}: {pair.key} = {pair.other}")
            if len(one.pairs) > SHOWN:
                lines.append(f"  ... and {len(one.pairs) - SHOWN} more; --json lists all")
        return "\n".join(lines)

    def json(self) -> str:
        """The same with all pairs, as JSON."""
        return json.dumps(asdict(self) | {"clean": self.clean}, indent=1)


@dataclass(frozen=True)
class _Side:
    """Rows with images that are compared: digest and key str (n,), group str (n,)."""

    features: Features
    rows: NDArray[np.int64]
    key: NDArray[np.object_]
    sha: NDArray[np.object_]
    group: NDArray[np.object_]

    def blocks(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Positions and unit features of the rows that have some, a block at a time."""
        for start in range(0, len(self.rows), BLOCK):
            block = self.features.images(self.rows[start : start + BLOCK])
            yield start + np.flatnonzero(block.available), block.values[block.available]


def find_leakage(
    suite: Suite, training: FeatureStore | None = None, model: str | None = None, cosine: float = NEAR
) -> LeakageReport:
    """Compare the val and test rows of every data set with a training corpus and with each other.

    Inside one split a copy counts only in another group: several slices of a patient, or several questions about an
    image whose group column says so, are not independent and are not treated as such by the intervals either.

    Args:
        suite: the evaluation sets.
        training: the store of the corpus that a student was trained on.
        model: the encoder whose features are compared; by default the first that all stores hold.
        cosine: threshold of near copies, within (0, 1].

    Raises:
        UserError: no encoder that all stores hold, a threshold that is none, or rows that cannot be found.
        TeacherMismatchError: the encoder has other weights in one of the stores.
    """
    if not 0 < cosine <= 1:
        raise UserError(f"a cosine of {cosine:g} is no threshold; give one above 0 and up to 1, for example {NEAR}")
    stores = {path: FeatureStore.open(path) for path in dict.fromkeys(spec.store for spec in suite.datasets)}
    slug = _common_encoder(suite, [*stores.values(), *([training] if training is not None else [])], model)
    corpus = None if training is None else _corpus(training, slug)
    overlaps: list[Overlap] = []
    for spec in suite.datasets:
        data = load_dataset(spec, stores[spec.store])
        sides = {name: _side(data, samples, slug) for name, samples in data.splits.items()}
        for split, against in (("test", ("train", "val", "test")), ("val", ("train", "val"))):
            if split not in sides:
                continue
            others = {} if corpus is None else {TRAINING: corpus}
            others |= {name: sides[name] for name in against if name in sides}
            names = (spec.dataset, split)
            overlaps += [_compare((*names, name), sides[split], other, cosine) for name, other in others.items()]
    return LeakageReport(suite.suite, slug, cosine, None if training is None else str(training.root), tuple(overlaps))


def _common_encoder(suite: Suite, stores: list[FeatureStore], model: str | None) -> str:
    """The encoder to compare by, with the same weights in all stores."""
    shared = [slug for slug in stores[0].teachers if all(slug in store.teachers for store in stores)]
    wanted = [model] if model is not None else [slug for slug in suite.models or shared if slug in shared]
    if not wanted or wanted[0] not in shared:
        raise UserError(
            f"{model or 'no encoder'} is not in all of {', '.join(str(store.root) for store in stores)}; "
            f"in all of them: {', '.join(shared) or 'none'}; extract one encoder into all"
        )
    digests = {store.card(wanted[0]).digest for store in stores}
    if len(digests) > 1:
        raise TeacherMismatchError(
            f"{wanted[0]} has different weights or preprocessing in the stores (digests {', '.join(sorted(digests))}); "
            "its features cannot be compared; extract it anew"
        )
    return wanted[0]


def _side(data: DatasetRows, samples: Samples, slug: str) -> _Side:
    sha = samples.column("image_sha256")
    there = sha != None  # noqa: E711 - element by element
    groups = data.groups(samples)
    features = Features(data.store, slug)
    return _Side(features, samples.rows[there], samples.ids[there], sha[there], groups[there])


def _corpus(store: FeatureStore, slug: str) -> _Side:
    table = store.sample_table(columns=["row", "key", "image_sha256"])
    table = table.filter(table["image_sha256"].is_valid())
    key, sha = (np.array(table[name].to_pylist(), dtype=object) for name in ("key", "image_sha256"))
    return _Side(Features(store, slug), table["row"].to_numpy().astype(np.int64), key, sha, key)


def _compare(names: tuple[str, str, str], one: _Side, other: _Side, threshold: float) -> Overlap:
    """Copies of the rows of one side among those of the other; the same object twice compares it with itself."""
    itself = one is other
    exact = _exact(one, other, itself)
    block = one.features.images(one.rows)
    asked = block.available & np.array([pair is None for pair in exact], dtype=bool)
    excluded = np.unique(one.group.astype(str), return_inverse=True)[1] if itself else None
    best, where = nearest(block.values[asked], other.blocks(), *_excluding(excluded, asked))
    compared = where >= 0
    rows = np.flatnonzero(asked)[compared]
    near = [
        Pair(str(one.key[row]), str(other.key[position]), "near", round(float(cosine), 6))
        for row, position, cosine in zip(rows, where[compared], best[compared], strict=True)
        if cosine >= threshold
    ]
    copies = [pair for pair in exact if pair is not None]
    return Overlap(
        *names,
        images=len(one.rows),
        featured=int(block.available.sum()),
        exact=len(copies),
        near=len(near),
        median=round(float(np.median(best[compared])), 6) if compared.any() else None,
        highest=round(float(best[compared].max()), 6) if compared.any() else None,
        pairs=(*copies, *sorted(near, key=lambda pair: (-(pair.cosine or 0), pair.key))),
    )


def _excluding(
    group: NDArray[np.int64] | None, asked: NDArray[np.bool_]
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """What `nearest` needs to leave a query's own group out: its group, and the group of every row."""
    return (None, None) if group is None else (group[asked], group)


def _exact(one: _Side, other: _Side, itself: bool) -> list[Pair | None]:
    """For every row of `one` a row of `other` with the same bytes, in another group when a side meets itself."""
    holders: dict[str, dict[str, str]] = {}
    for sha, key, group in zip(other.sha, other.key, other.group, strict=True):
        holders.setdefault(sha, {}).setdefault(group, key)
    found: list[Pair | None] = []
    for sha, key, group in zip(one.sha, one.key, one.group, strict=True):
        copies = [held for owner, held in holders.get(sha, {}).items() if not (itself and owner == group)]
        found.append(Pair(str(key), str(copies[0]), "exact", None) if copies else None)
    return found
