"""Test images that a model may have seen: copies in a training corpus, in other splits, and inside a split. Exact
copies have the same bytes; near copies have features of a cosine above a threshold, or perceptual hashes that differ in
few bits. A threshold is a choice, so the report shows how near the nearest neighbors are in general."""

import hashlib
import io
import json
from collections.abc import Callable
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

from mmkd.base.arrays import Bools, Ints, Objects, Singles
from mmkd.base.errors import CorruptStoreError, TeacherMismatchError, faults_as
from mmkd.base.files import regular_target, write_atomically
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.base.install import import_extra
from mmkd.base.process import usable_cores
from mmkd.base.text import one_line
from mmkd.evaluate.dataset import load_dataset
from mmkd.evaluate.features import Features
from mmkd.evaluate.neighbors import BLOCK, Blocks, nearest_rows
from mmkd.evaluate.suite import Suite
from mmkd.store import FeatureStore, UserError

HASH_BITS = 64
HASHES = pa.schema({"image_sha256": pa.string(), "phash": pa.uint64()})
SAVE_EVERY = 12
"""Blocks of images after which the file of hashes is written: an hour's work is not lost."""
SHOWN = 3
"""Pairs that the text shows of each comparison; JSON has all."""


@dataclass(frozen=True)
class Pair:
    """A row of an evaluation set and its copy, with the cosine of their features or the bits that their hashes differ
    in."""

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
    """Rows with a near copy by one measure. compared: rows that have what is compared. found: rows without an exact
    copy whose nearest neighbor is within the threshold. typical, nearest: median and best cosine or number of bits."""

    compared: int
    found: int
    typical: float | None
    nearest: float | None


@dataclass(frozen=True)
class Overlap:
    """Rows of one split that have a copy in another place. images: rows with an image. exact: rows with a copy of the
    same bytes. hash: None if hashes were not requested."""

    dataset: str
    split: str
    against: str
    images: int
    exact: int
    features: Near
    hash: Near | None
    pairs: tuple[Pair, ...]

    def lines(self) -> list[str]:
        place = "inside (other groups)" if self.against == self.split else f"in {self.against}"
        found = f"{self.hash.found} near by hash, " if self.hash else ""
        found += f"{self.features.found} near by features of {self.images} images"
        lines = [f"{self.dataset} {self.split} {place}: {self.exact} exact, {found}"]
        scale = []
        if self.features.typical is not None:
            scale.append(f"cosine {self.features.typical:.3f} and {self.features.nearest:.3f}")
        if self.hash is not None and self.hash.typical is not None:
            scale.append(f"{self.hash.typical:.0f} and {self.hash.nearest:.0f} bits")
        if scale:
            lines.append(f"  nearest neighbors, median and closest: {'; '.join(scale)}")
        for near, what in ((self.features, "features"), (self.hash, "hash: gone, changed, or of one color")):
            if near is not None and near.compared < self.images:
                lines.append(f"  {self.images - near.compared} images have no {what}")
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
        return not any(one.pairs for one in self.overlaps)

    def text(self) -> str:
        measures = ["exact copies by SHA-256", f"near copies by cosine >= {self.cosine:g} of {self.model}"]
        if self.bits is not None:
            measures.append(f"and by perceptual hashes that differ in {self.bits} of 64 bits or fewer")
        corpus = f"training corpus {self.training}" if self.training else "no training corpus named"
        head = f"suite {self.suite}: {', '.join(measures)}; {corpus}"
        return "\n".join(map(one_line, [head, *(line for one in self.overlaps for line in one.lines())]))

    def json(self) -> str:
        return json.dumps(asdict(self) | {"clean": self.clean}, indent=1)


@dataclass(frozen=True)
class Thresholds:
    """Thresholds for near-duplicates: cosine of features, in (0, 1], and differing bits of hashes, 0 to 31. Raises
    UserError for others."""

    cosine: float = 0.98
    bits: int = 4
    """Of copies that were halved in size, saved as JPEG of quality 30 or brightened by 30 %, 95 % differ in 2 to 6
    bits; so does up to one in ten pairs of nearest neighbors in sets whose images all look alike (BreastMNIST, Medical
    MNIST)."""

    def __post_init__(self) -> None:
        if not 0 < self.cosine <= 1:
            raise UserError(f"a cosine of {self.cosine:g} is no threshold; give one above 0 and up to 1, e.g. 0.98")
        if not 0 <= self.bits < HASH_BITS // 2:
            raise UserError(f"{self.bits} differing bits are no threshold: half of 64 differ by chance; give 0 to 31")


@dataclass(frozen=True)
class _Side:
    """Rows with images that are compared. place: their split, or the training corpus. key, sha, group: str (n,).
    hashes: uint64 (n,), and which are there, bool (n,)."""

    dataset: str
    place: str
    features: Features
    rows: Ints
    key: Objects
    sha: Objects
    group: Objects
    hashes: tuple[NDArray[np.uint64], Bools] | None

    def blocks(self, kind: Literal["hash", "features"]) -> Blocks:
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
    hashes: "ImageHashes | None" = None,
) -> LeakageReport:
    """Compare the val and test rows of every data set with the corpus of `training` and with each other, by features of
    `model` (by default the first encoder that all stores hold) and by `hashes`; images without one are read from
    their corpora. Inside one split a copy counts only in another group: slices of a patient are not independent. Raises
    UserError if the stores have no encoder in common, TeacherMismatchError if it has other weights in one of them."""
    limits = thresholds or Thresholds()
    stores = {path: FeatureStore.open(path) for path in dict.fromkeys(spec.store for spec in suite.datasets)}
    slug = _common_encoder(suite, [*stores.values(), *([training] if training is not None else [])], model)

    def side(store: FeatureStore, dataset: str, place: str, table: pa.Table, group: Objects | None = None) -> _Side:
        there = table["image_sha256"].is_valid().to_numpy()
        key, sha = (np.array(table[name].to_pylist(), dtype=object)[there] for name in ("key", "image_sha256"))
        rows = table["row"].to_numpy().astype(np.int64)[there]
        held = None if hashes is None else hashes.of_rows(store, rows, sha)
        groups = key if group is None else group[there]
        return _Side(dataset, place, Features(store, slug), rows, key, sha, groups, held)

    corpora = []
    if training is not None:
        # A view has its image's bytes and nearly its features: the image is compared, once.
        inputs = pc.field("image_rows").is_null()
        learned = training.sample_table(["row", "key", "image_sha256"], inputs)
        corpora.append(side(training, "", "training corpus", learned))
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
    corpus, bits = None if training is None else str(training.root), None if hashes is None else limits.bits
    return LeakageReport(suite.suite, slug, limits.cosine, bits, corpus, tuple(overlaps))


def _common_encoder(suite: Suite, stores: list[FeatureStore], model: str | None) -> str:
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
    """Return copies of the rows of one side among those of the other; inside one side only those of other groups."""
    holders: dict[str, dict[str, str]] = {}
    for sha, key, group in zip(other.sha, other.key, other.group, strict=True):
        holders.setdefault(sha, {}).setdefault(group, key)
    alone = np.ones(len(one.rows), dtype=bool)
    exact = []
    for i, (sha, key, group) in enumerate(zip(one.sha, one.key, one.group, strict=True)):
        if copies := [held for owner, held in holders.get(sha, {}).items() if one is not other or owner != group]:
            exact.append(Pair(str(key), str(copies[0]), "exact"))
            alone[i] = False
    groups = np.unique(one.group.astype(str), return_inverse=True)[1] if one is other else None

    def near_copies(kind: Literal["hash", "features"]) -> tuple[Near, list[Pair]]:
        """How near the nearest neighbors of rows without an exact copy are; pairs within the threshold, nearest
        first."""
        own = list(one.blocks(kind))
        if not own:
            return Near(0, 0, None, None), []
        least = limits.cosine if kind == "features" else HASH_BITS - 2 * limits.bits

        def closeness(product: np.floating[Any]) -> float:
            return round(float(product), 6) if kind == "features" else (HASH_BITS - float(product)) / 2

        positions, values = (np.concatenate(parts) for parts in zip(*own, strict=True))
        asked = positions[alone[positions]]
        excluded = None if groups is None else groups[asked]
        found = nearest_rows(values[alone[positions]], other.blocks(kind), 1, excluded, groups)
        where, best = (column[:, 0] for column in found)
        order = np.argsort(-best, kind="stable")[: int((where >= 0).sum())]
        best = best[order]
        typical, closest = (closeness(np.median(best)), closeness(best[0])) if len(best) else (None, None)
        near = Near(len(positions), int((best >= least).sum()), typical, closest)
        pairs = []
        for product, i in zip(best[: near.found], order, strict=False):
            cosine, bits = (closeness(product), None) if kind == "features" else (None, round(closeness(product)))
            pairs.append(Pair(str(one.key[asked[i]]), str(other.key[where[i]]), kind, cosine, bits))
        return near, pairs

    by_hash, hashed = near_copies("hash") if one.hashes is not None else (None, [])
    by_features, near = near_copies("features")
    pairs = (*exact, *hashed, *near)
    return Overlap(one.dataset, one.place, other.place, len(one.rows), len(exact), by_features, by_hash, pairs)


class ImageHashes:
    """A Parquet file `image_sha256, phash` (uint64; null where the picture has none) and the hashes added to it."""

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        """Open or begin a file; `say` is told before many images are read. Raises UserError if the package imagehash is
        not installed; CorruptStoreError if the file is something else."""
        import_extra("imagehash", "leakage", "a perceptual hash")
        self._file, self._say = file, say
        self._known = HASHES.empty_table()
        if regular_target(file).exists():  # reading a pipe would block
            fault, advice = f"{file} is no file of image hashes", "; name another, or delete it"
            with faults_as(CorruptStoreError, (OSError, KeyError, pa.ArrowInvalid), fault, advice):
                self._known = pq.read_table(file).select(HASHES.names).cast(HASHES)

    def of_rows(self, store: FeatureStore, rows: Ints, sha: Objects) -> tuple[NDArray[np.uint64], Bools]:
        """Return hashes uint64 (n,) of the images of grid rows int64 (n,) with the digests `sha`, str (n,), and bool
        (n,), False where the image is gone, changed or of one color. The corpus is read for what the file lacks."""
        asked = pa.array(sha.tolist(), pa.string())
        unknown = pc.index_in(asked, value_set=self._known["image_sha256"]).is_null().to_numpy(zero_copy_only=False)
        if unknown.any():
            _, first = np.unique(sha[unknown].astype(str), return_index=True)
            self._read(store, np.sort(rows[unknown][first]))
        place = pc.index_in(asked, value_set=self._known["image_sha256"])
        hashes = self._known["phash"].combine_chunks().take(place)
        return hashes.fill_null(0).to_numpy(), hashes.is_valid().to_numpy(zero_copy_only=False)

    def _read(self, store: FeatureStore, rows: Ints) -> None:
        self._say(f"reading {len(rows):,} images of {store.root} for their hashes")
        table = store.sample_table(columns=["row", "uri", "offset", "length", "image_sha256"])
        table = table.filter(pc.is_in(table["row"], value_set=pa.array(rows)))
        with ThreadPoolExecutor(usable_cores()) as pool:
            for number, batch in enumerate(table.to_batches(max_chunksize=BLOCK), start=1):
                images = [one for one in batch.to_pylist() if one["uri"] is not None]
                roots = [store.record.image_root(one["row"]) for one in images]
                found = [one for one in pool.map(_hash_row, roots, images) if one is not None]
                self._known = pa.concat_tables([self._known, pa.Table.from_pylist(found, HASHES)])
                if number % SAVE_EVERY == 0:
                    self._save()
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
    """Return `imagehash.phash` as a number: the signs of the 64 lowest frequencies of the 32 x 32 gray picture against
    their median (Zauner 2010, section 3.2.1). None for a single color: all blank pictures would be copies."""
    import imagehash  # noqa: PLC0415 - an extra

    gray = picture.convert("L")
    low, high = gray.getextrema()
    return None if low == high else int.from_bytes(np.packbits(imagehash.phash(gray).hash).tobytes(), "big")


def as_signs(hashes: NDArray[np.uint64]) -> Singles:
    """Return hashes as rows of -1 and 1, float32 (n, 64): their inner product is 64 minus twice the bits that
    differ."""
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8)).reshape(-1, HASH_BITS)
    return bits.astype(np.float32) * 2 - 1
