"""Test images that a model may have seen: copies in a training corpus, in other splits, and inside a split.

Exact copies have the same encoded bytes (SHA-256 of the sample table). Near copies are images whose features by one
encoder have a cosine of at least a stated threshold (a resaved, resized or slightly cropped copy, or a neighboring
slice), and, on request, images whose perceptual hashes differ in few bits. A threshold is a choice, so the report shows
how near the nearest neighbors are in general.

The hash is `imagehash.phash`: the signs of the 64 lowest frequencies of the 32 x 32 gray picture, taken against their
median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1). It sees what
a copy keeps when it is saved, scaled or brightened again, and needs no encoder.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.errors import CorruptStoreError, TeacherMismatchError
from mmkd.base.files import regular_target, write_atomically
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.base.install import install_command
from mmkd.base.process import usable_cores
from mmkd.base.text import one_line
from mmkd.evaluate.dataset import load_dataset
from mmkd.evaluate.features import Features
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
"""Numbers, int64 (m,), and unit features or signs, float32 (m, D), of the rows that have some, a block at a time."""
QUERIES = 4096
"""Queries multiplied at a time; against a block of 8192 rows the scores take 128 MiB of float32."""
BLOCK = 8192
"""Rows whose features, or images whose hashes, are taken at a time."""
HASH_BITS = 64
HASHES = pa.schema({"image_sha256": pa.string(), "phash": pa.uint64()})
SAVE_EVERY = 100_000
"""Images after which the file of hashes is written: an hour's work is not lost."""
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
        return not any(one.pairs for one in self.overlaps)

    def text(self) -> str:
        measures = ["exact copies by SHA-256", f"near copies by cosine >= {self.cosine:g} of {self.model}"]
        if self.bits is not None:
            measures.append(f"and by perceptual hashes that differ in {self.bits} of 64 bits or fewer")
        corpus = f"training corpus {self.training}" if self.training else "no training corpus named"
        lines = [f"suite {self.suite}: {', '.join(measures)}; {corpus}"]
        return "\n".join(map(one_line, [*lines, *(line for one in self.overlaps for line in one.lines())]))

    def json(self) -> str:
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
        training: store of the corpus that a student was trained on.
        model: encoder whose features are compared; by default the first that all stores hold.
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

    corpora, columns = [], ["row", "key", "image_sha256"]
    if training is not None:
        corpora.append(side(training, "", TRAINING, training.sample_table(columns=columns)))
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
            "its features cannot be compared; extract it again"
        )
    return wanted[0]


def _compare(one: _Side, other: _Side, limits: Thresholds) -> Overlap:
    """Return copies of the rows of one side among those of the other; the same object twice compares it with itself,
    and then only rows of other groups count."""
    itself = one is other
    holders: dict[str, dict[str, str]] = {}
    for sha, key, group in zip(other.sha, other.key, other.group, strict=True):
        holders.setdefault(sha, {}).setdefault(group, key)
    alone = np.ones(len(one.rows), dtype=bool)
    pairs = []
    for i, (sha, key, group) in enumerate(zip(one.sha, one.key, one.group, strict=True)):
        copies = [held for owner, held in holders.get(sha, {}).items() if not (itself and owner == group)]
        if copies:
            pairs.append(Pair(str(key), str(copies[0]), "exact"))
            alone[i] = False
    exact, by_hash = len(pairs), None
    groups = np.unique(one.group.astype(str), return_inverse=True)[1] if itself else None
    if one.hashes is not None:
        by_hash, near = _near_copies(one, other, "hash", alone=alone, group=groups, limits=limits)
        pairs += near
    by_features, near = _near_copies(one, other, "features", alone=alone, group=groups, limits=limits)
    return Overlap(one.dataset, one.place, other.place, len(one.rows), exact, by_features, by_hash, (*pairs, *near))


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
    typical, closest = (closeness(np.median(best)), closeness(best[0])) if len(best) else (None, None)
    near = Near(len(positions), int((best >= least).sum()), typical, closest)
    pairs = []
    for product, i in zip(best[: near.found], order[: near.found], strict=True):
        size = closeness(product)
        measured: dict[str, Any] = {"bits": round(size)} if kind == "hash" else {"cosine": size}
        pairs.append(Pair(str(one.key[asked[i]]), str(other.key[where[i]]), kind, **measured))
    return near, pairs


def nearest(
    queries: NDArray[np.float32],
    blocks: Blocks,
    excluded: NDArray[np.int64] | None = None,
    group: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Find the row with the highest inner product for every query, float32 (n, D); the first of equal ones. Returns
    inner products, float32 (n,), and numbers, int64 (n,); -inf and -1 where nothing was found. `blocks`: numbers ascend
    over all of them. `excluded`: int64 (n,), for every query the group whose rows may not be its answer. `group`:
    int64, the group of every number."""
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    where = np.full(len(queries), -1, dtype=np.int64)
    for numbers, values in blocks:
        for start in range(0, len(queries) if len(numbers) else 0, QUERIES):
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


class ImageHashes:
    """A Parquet file `image_sha256, phash` (uint64; null where the picture has none) and the hashes added to it."""

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        """Open or begin a file; `say` is told before many images are read. Raises UserError if the package imagehash is
        not installed; CorruptStoreError if the file is something else."""
        try:
            import imagehash  # noqa: F401, PLC0415 - an extra
        except ImportError:
            raise UserError(f"perceptual hashes need imagehash; run: {install_command('leakage')}") from None
        self._file, self._say = file, say
        self._known = HASHES.empty_table()
        if regular_target(file).exists():  # reading a pipe would block
            try:
                self._known = pq.read_table(file).select(HASHES.names).cast(HASHES)
            except (OSError, KeyError, pa.ArrowInvalid) as error:
                raise CorruptStoreError(f"{file} is no file of image hashes; name another, or delete it") from error

    def of_rows(
        self, store: FeatureStore, rows: NDArray[np.int64], sha: NDArray[np.object_]
    ) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
        """Return hashes of the images of these rows. Result: uint64 (n,), and bool (n,): False where the image is gone,
        is no longer the same, or is all of one color. `store`: whose corpus is read for images that the file lacks.
        `rows`: int64 (n,), grid rows with an image. `sha`: str (n,), their `image_sha256`."""
        asked = pa.array(sha.tolist(), pa.string())
        unknown = pc.index_in(asked, value_set=self._known["image_sha256"]).is_null().to_numpy(zero_copy_only=False)
        if unknown.any():
            _, first = np.unique(sha[unknown].astype(str), return_index=True)
            self._read(store, np.sort(rows[unknown][first]))
        place = pc.index_in(asked, value_set=self._known["image_sha256"])
        hashes = self._known["phash"].combine_chunks().take(place)
        return hashes.fill_null(0).to_numpy(), hashes.is_valid().to_numpy(zero_copy_only=False)

    def _read(self, store: FeatureStore, rows: NDArray[np.int64]) -> None:
        """Hash the images of these rows and store the hashes."""
        self._say(f"reading {len(rows):,} images of {store.root} for their hashes")
        table = store.sample_table(columns=["row", "uri", "offset", "length", "image_sha256"])
        table = table.filter(pc.is_in(table["row"], value_set=pa.array(rows)))
        unsaved = 0
        with ThreadPoolExecutor(usable_cores()) as pool:
            for batch in table.to_batches(max_chunksize=BLOCK):
                images = [one for one in batch.to_pylist() if one["uri"] is not None]
                roots = [store.record.image_root(one["row"]) for one in images]
                found = [one for one in pool.map(_hash_row, roots, images) if one is not None]
                self._known = pa.concat_tables([self._known, pa.Table.from_pylist(found, HASHES)])
                unsaved += len(batch)
                if unsaved >= SAVE_EVERY:
                    self._save()
                    unsaved = 0
        self._save()

    def _save(self) -> None:
        buffer = io.BytesIO()
        pq.write_table(self._known, buffer, compression="zstd")
        write_atomically(self._file, buffer.getvalue())


def _hash_row(root: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of `HASHES` of an image, or None where the file is missing or holds another image."""
    try:
        data = image_source(root, row["uri"], row["offset"], row["length"]).read()
        digest = hashlib.sha256(data).hexdigest()
        same = digest == row["image_sha256"]
        return {"image_sha256": digest, "phash": perceptual_hash(decode(data))} if same else None
    except ImageError:
        return None


def perceptual_hash(picture: Image.Image) -> int | None:
    """Return the 64 bits of a picture as a number, the lowest frequency first; None for one of a single color. A hash
    of a blank picture would equal that of every other."""
    import imagehash  # noqa: PLC0415 - an extra

    gray = picture.convert("L")
    low, high = gray.getextrema()
    if low == high:
        return None
    bits = imagehash.phash(gray).hash.reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def as_signs(hashes: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return hashes as rows of -1 and 1, float32 (n, 64): their inner product is 64 minus twice the bits that
    differ."""
    octets = hashes.astype(">u8").view(np.uint8).reshape(-1, HASH_BITS // 8)
    return np.unpackbits(octets, axis=1).astype(np.float32) * 2 - 1
