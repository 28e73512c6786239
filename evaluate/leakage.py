"""Test images that a model may have seen: copies in a training corpus, in other splits, and inside a split.

Exact copies have the same encoded bytes (SHA-256 of the sample table). Near copies are images whose features by one
encoder have a cosine of at least a stated threshold (a resaved, resized or slightly cropped copy, or a neighboring
slice), and, on request, images whose perceptual hashes differ in few bits. A threshold is a choice, so the report shows
how near the nearest neighbors are in general.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import TeacherMismatchError
from mmkd.base.text import one_line
from mmkd.evaluate.dataset import load_dataset
from mmkd.evaluate.features import Features
from mmkd.evaluate.image_hash import HASH_BITS, ImageHashes, as_signs
from mmkd.evaluate.suite import Suite
from mmkd.store import FeatureStore, UserError

NEAR = 0.98
"""Default cosine from which two images are reported as near copies."""
NEAR_BITS = 4
"""Default number of differing bits of 64 up to which they are. Of copies of real images that were halved in size, saved
as JPEG of quality 30 or brightened by 30 %, 95 % differ in 2 to 6 bits; but so does up to one in ten unrelated pairs of
nearest neighbors in sets whose images all look alike (measured on BreastMNIST and Medical MNIST)."""
TRAINING = "training corpus"

Blocks = Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]
"""Positions (m,) and unit features or signs (m, D) of the rows that have some, a block at a time."""
QUERIES = 4096
"""Queries multiplied at a time; against a block of 8192 rows the scores take 128 MiB of float32."""
BLOCK = 8192
"""Rows that a caller should hand over at a time."""
SHOWN = 3
"""Pairs that the text shows of each comparison; JSON has all."""


@dataclass(frozen=True)
class Pair:
    """A row of an evaluation set and its copy. cosine: of their features, for the kind `features`. bits: in which their
    hashes differ, for the kind `hash`."""

    key: str
    other: str
    kind: Literal["exact", "hash", "features"]
    cosine: float | None = None
    bits: int | None = None

    def __str__(self) -> str:
        """Return one line."""
        closeness = {"exact": "", "hash": f" {self.bits} bits", "features": f" {self.cosine}"}[self.kind]
        return f"{self.kind}{closeness}: {self.key} = {self.other}"


@dataclass(frozen=True)
class Near:
    """Rows with a near copy by one measure. compared: rows that have what is compared. found: rows whose nearest
    neighbor is within the threshold; a row with an exact copy is not counted. typical, nearest: median and best value
    over the nearest neighbors of all rows: a cosine, or a number of bits."""

    compared: int
    found: int
    typical: float | None
    nearest: float | None


@dataclass(frozen=True)
class Overlap:
    """Rows of one split that have a copy in another place. images: rows with an image. exact: rows with a copy of the
    same bytes. features, hash: near copies by either measure; hash is None if hashes were not requested."""

    dataset: str
    split: str
    against: str
    images: int
    exact: int
    features: Near
    hash: Near | None
    pairs: tuple[Pair, ...]

    @property
    def found(self) -> bool:
        """True if there is any copy."""
        return bool(self.exact + self.features.found + (self.hash.found if self.hash else 0))

    def lines(self) -> list[str]:
        """For people: counts, how near the nearest neighbors are in general, and the first pairs."""
        place = "inside (other groups)" if self.against == self.split else f"in {self.against}"
        by_hash = f"{self.hash.found} near by hash, " if self.hash else ""
        near = f"{self.features.found} near by features"
        lines = [f"{self.dataset} {self.split} {place}: {self.exact} exact, {by_hash}{near} of {self.images} images"]
        scale = []
        if self.features.typical is not None:
            scale.append(f"cosine {self.features.typical:.3f} and {self.features.nearest:.3f}")
        if self.hash is not None and self.hash.typical is not None:
            scale.append(f"{self.hash.typical:.0f} and {self.hash.nearest:.0f} bits")
        if scale:
            lines.append(f"  nearest neighbors, median and closest: {'; '.join(scale)}")
        if self.features.compared < self.images:
            lines.append(f"  {self.images - self.features.compared} images have no features")
        if self.hash is not None and self.hash.compared < self.images:
            lines.append(f"  {self.images - self.hash.compared} images have no hash: gone, changed, or of one color")
        lines += [f"  {pair}" for pair in self.pairs[:SHOWN]]
        if len(self.pairs) > SHOWN:
            lines.append(f"  ... and {len(self.pairs) - SHOWN} more; --json lists all")
        return lines


@dataclass(frozen=True)
class LeakageReport:
    """All comparisons of a suite. bits is None if hashes were not requested."""

    suite: str
    model: str
    cosine: float
    bits: int | None
    training: str | None
    overlaps: tuple[Overlap, ...]

    @property
    def clean(self) -> bool:
        """True if no copy was found."""
        return not any(one.found for one in self.overlaps)

    def text(self) -> str:
        """Return a few lines per comparison."""
        measures = ["exact copies by SHA-256", f"near copies by cosine >= {self.cosine:g} of {self.model}"]
        if self.bits is not None:
            measures.append(f"and by perceptual hashes that differ in {self.bits} of 64 bits or fewer")
        corpus = f"training corpus {self.training}" if self.training else "no training corpus named"
        lines = [f"suite {self.suite}: {', '.join(measures)}; {corpus}"]
        return "\n".join(map(one_line, [*lines, *(line for one in self.overlaps for line in one.lines())]))

    def json(self) -> str:
        """Return the same with all pairs, as JSON."""
        return json.dumps(asdict(self) | {"clean": self.clean}, indent=1)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds for near-duplicates: cosine of features, differing bits of hashes."""

    cosine: float = NEAR
    bits: int = NEAR_BITS

    def __post_init__(self) -> None:
        """Validate thresholds. Raises UserError for a cosine outside (0, 1], or bits outside 0 to 31."""
        if not 0 < self.cosine <= 1:
            raise UserError(f"a cosine of {self.cosine:g} is no threshold; give one above 0 and up to 1, e.g. {NEAR}")
        if not 0 <= self.bits < HASH_BITS // 2:
            raise UserError(f"{self.bits} differing bits are no threshold: half of 64 differ by chance; give 0 to 31")


@dataclass(frozen=True)
class _Side:
    """Rows with images that are compared. place: their split, or the training corpus. key, sha, group: str (n,).
    hashes: uint64 (n,), and which are there, bool (n,)."""

    dataset: str
    place: str
    features: Features
    rows: NDArray[np.int64]
    key: NDArray[np.object_]
    sha: NDArray[np.object_]
    group: NDArray[np.object_]
    hashes: tuple[NDArray[np.uint64], NDArray[np.bool_]] | None

    def blocks(self, kind: Literal["hash", "features"]) -> Blocks:
        """Unit features, or signs of the hashes."""
        if kind == "features":
            for start in range(0, len(self.rows), BLOCK):
                block = self.features.images(self.rows[start : start + BLOCK])
                yield start + np.flatnonzero(block.available), block.values[block.available]
        elif self.hashes is not None:
            values, there = self.hashes
            positions = np.flatnonzero(there)
            for start in range(0, len(positions), BLOCK):
                part = positions[start : start + BLOCK]
                yield part, as_signs(values[part])


def find_leakage(
    suite: Suite,
    training: FeatureStore | None = None,
    model: str | None = None,
    thresholds: Thresholds | None = None,
    hashes: ImageHashes | None = None,
) -> LeakageReport:
    """Compare the val and test rows of every data set with a training corpus and with each other. Inside one split a
    copy counts only in another group: several slices of a patient, or several questions about an image whose group
    column says so, are not independent and are not treated as such by the intervals either. Raises UserError if there
    is no encoder that all stores hold, or rows that cannot be found. Raises TeacherMismatchError if the encoder has
    other weights in one of the stores.

    Args:
        suite: the evaluation sets.
        training: the store of the corpus that a student was trained on.
        model: the encoder whose features are compared; by default the first that all stores hold.
        thresholds: of near copies.
        hashes: compare perceptual hashes too, kept there; images without one are read from their corpora.
    """
    limits = thresholds or Thresholds()
    stores = {path: FeatureStore.open(path) for path in dict.fromkeys(spec.store for spec in suite.datasets)}
    slug = _common_encoder(suite, [*stores.values(), *([training] if training is not None else [])], model)

    def side(
        store: FeatureStore, dataset: str, place: str, table: pa.Table, group: NDArray[np.object_] | None = None
    ) -> _Side:
        """Rows of a sample table that have an image; without groups every row is its own."""
        there = table["image_sha256"].is_valid().to_numpy()
        key, sha = (np.array(table[name].to_pylist(), dtype=object)[there] for name in ("key", "image_sha256"))
        rows = table["row"].to_numpy().astype(np.int64)[there]
        held = None if hashes is None else hashes.of_rows(store, rows, sha)
        return _Side(
            dataset, place, Features(store, slug), rows, key, sha, key if group is None else group[there], held
        )

    corpora = []
    if training is not None:
        corpora = [side(training, "", TRAINING, training.sample_table(columns=["row", "key", "image_sha256"]))]
    overlaps: list[Overlap] = []
    for spec in suite.datasets:
        data = load_dataset(spec, stores[spec.store])
        sides = {
            name: side(data.store, spec.dataset, name, samples.table, data.groups(samples))
            for name, samples in data.splits.items()
        }
        for split, against in (("test", ("train", "val", "test")), ("val", ("train", "val"))):
            if split in sides:
                others = corpora + [sides[name] for name in against if name in sides]
                overlaps += [_compare(sides[split], other, limits) for other in others]
    corpus_name = None if training is None else str(training.root)
    bits = None if hashes is None else limits.bits
    return LeakageReport(suite.suite, slug, limits.cosine, bits, corpus_name, tuple(overlaps))


def _common_encoder(suite: Suite, stores: list[FeatureStore], model: str | None) -> str:
    """Return the encoder to compare by, with the same weights in all stores."""
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


def _compare(one: _Side, other: _Side, limits: Thresholds) -> Overlap:
    """Return copies of the rows of one side among those of the other; the same object twice compares it with itself."""
    itself = one is other
    exact = _exact(one, other, itself)
    alone = np.array([pair is None for pair in exact], dtype=bool)
    group = np.unique(one.group.astype(str), return_inverse=True)[1] if itself else None
    pairs = [pair for pair in exact if pair is not None]
    by_hash, hash_pairs = None, []
    if one.hashes is not None:
        by_hash, hash_pairs = _near_copies(one, other, "hash", alone=alone, group=group, limits=limits)
    by_features, feature_pairs = _near_copies(one, other, "features", alone=alone, group=group, limits=limits)
    return Overlap(
        one.dataset, one.place, other.place, len(one.rows), len(pairs), by_features, by_hash,
        tuple(pairs + hash_pairs + feature_pairs),
    )  # fmt: skip


def _near_copies(
    one: _Side,
    other: _Side,
    kind: Literal["hash", "features"],
    *,
    alone: NDArray[np.bool_],
    group: NDArray[np.int64] | None,
    limits: Thresholds,
) -> tuple[Near, list[Pair]]:
    """Return how near the nearest neighbors are, and the pairs within the threshold, nearest first. `alone`: bool (n,),
    False for rows of `one` that need no neighbor. `group`: int64, of the rows of both sides when they are one: a row of
    the same group is no neighbor."""
    own = list(one.blocks(kind))
    if not own:
        return Near(0, 0, None, None), []
    least = limits.cosine if kind == "features" else HASH_BITS - 2 * limits.bits

    def closeness(product: np.float32) -> float:
        """Cosine, or number of bits in which two hashes differ, from an inner product."""
        return round(float(product), 6) if kind == "features" else (HASH_BITS - float(product)) / 2

    positions, values = (np.concatenate(parts) for parts in zip(*own, strict=True))
    asked = positions[alone[positions]]
    excluded = None if group is None else group[asked]
    best, where = nearest(values[alone[positions]], other.blocks(kind), excluded, group)
    order = np.argsort(-best, kind="stable")[: int((where >= 0).sum())]
    best = best[order]
    near = Near(
        compared=len(positions),
        found=int((best >= least).sum()),
        typical=closeness(np.median(best)) if len(best) else None,
        nearest=closeness(best[0]) if len(best) else None,
    )
    pairs = []
    for product, i in zip(best[: near.found], order, strict=False):
        size = closeness(product)
        measured: dict[str, Any] = {"bits": round(size)} if kind == "hash" else {"cosine": size}
        pairs.append(Pair(str(one.key[asked[i]]), str(other.key[where[i]]), kind, **measured))
    return near, pairs


def _exact(one: _Side, other: _Side, itself: bool) -> list[Pair | None]:
    """For every row of `one` a row of `other` with the same bytes, in another group when a side meets itself."""
    holders: dict[str, dict[str, str]] = {}
    for sha, key, group in zip(other.sha, other.key, other.group, strict=True):
        holders.setdefault(sha, {}).setdefault(group, key)
    found: list[Pair | None] = []
    for sha, key, group in zip(one.sha, one.key, one.group, strict=True):
        copies = [held for owner, held in holders.get(sha, {}).items() if not (itself and owner == group)]
        found.append(Pair(str(key), str(copies[0]), "exact") if copies else None)
    return found


def nearest(
    queries: NDArray[np.float32],
    blocks: Blocks,
    excluded: NDArray[np.int64] | None = None,
    group: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the row with the highest inner product for every query; the first of equal ones. Returns inner products,
    float32 (n,), and numbers, int64 (n,); -inf and -1 where nothing was found.

    Args:
        queries: float32 (n, D), finite.
        blocks: pairs of numbers, int64 (m,), ascending over all blocks, and values, float32 (m, D), finite.
        excluded: int64 (n,), for every query the group whose rows may not be its answer.
        group: int64, the group of every number; goes with `excluded`.
    """
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    where = np.full(len(queries), -1, dtype=np.int64)
    for numbers, values in blocks:
        if len(numbers) == 0:
            continue
        for start in range(0, len(queries), QUERIES):
            part = slice(start, start + QUERIES)
            scores = queries[part] @ values.T
            if excluded is not None and group is not None:
                scores[excluded[part, None] == group[numbers]] = -np.inf
            column = scores.argmax(axis=1)
            found = scores[np.arange(len(column)), column]
            better = found > best[part]
            best[part][better] = found[better]
            where[part][better] = numbers[column[better]]
    return best, where
