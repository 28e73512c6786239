"""Perceptual hashes of a store's images, kept in a file so that no image is decoded twice.

The hash is `imagehash.phash`: the signs of the 64 lowest frequencies of the 32 x 32 gray picture, taken against their
median (Zauner 2010, "Implementation and benchmarking of perceptual image hash functions", section 3.2.1). It sees what
a copy keeps when it is saved, scaled or brightened again, and needs no encoder.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from mmkd.base.errors import CorruptStoreError
from mmkd.base.files import write_atomically
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError, ImageSource
from mmkd.base.images.uri import image_source
from mmkd.base.install import install_command
from mmkd.base.process import usable_cores
from mmkd.store import FeatureStore, UserError

HASH_BITS = 64
BATCH = 4096
"""Images whose sources wait at a time."""
SAVE_EVERY = 100_000
"""Images after which the file is written: an hour's work is not lost."""

_SCHEMA = pa.schema([pa.field("image_sha256", pa.string()), pa.field("phash", pa.uint64())])
_COLUMNS = ["row", "uri", "offset", "length", "image_sha256"]


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
        self._known = _SCHEMA.empty_table()
        if file.exists():
            try:
                self._known = pq.read_table(file).select(_SCHEMA.names).cast(_SCHEMA)
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
        table = store.sample_table(columns=_COLUMNS)
        table = table.filter(pc.is_in(table["row"], value_set=pa.array(rows)))
        unsaved = 0
        with ThreadPoolExecutor(usable_cores()) as pool:
            for batch in table.to_batches(max_chunksize=BATCH):
                found = [one for one in pool.map(hash_source, _sources(store, batch)) if one is not None]
                hashed = pa.table([[one[0] for one in found], [one[1] for one in found]], schema=_SCHEMA)
                self._known = pa.concat_tables([self._known, hashed])
                unsaved += len(batch)
                if unsaved >= SAVE_EVERY:
                    self._save()
                    unsaved = 0
        self._save()

    def _save(self) -> None:
        buffer = io.BytesIO()
        pq.write_table(self._known, buffer, compression="zstd")
        write_atomically(self._file, buffer.getvalue())


def _sources(store: FeatureStore, batch: pa.RecordBatch) -> Iterator[tuple[str, ImageSource]]:
    for one in batch.to_pylist():
        if one["uri"] is not None:
            root = store.record.image_root(one["row"])
            yield one["image_sha256"], image_source(root, one["uri"], one["offset"], one["length"])


def hash_source(named: tuple[str, ImageSource]) -> tuple[str, int | None] | None:
    """Return the digest and the hash of an image, or None where the file is missing or holds another image."""
    digest, source = named
    try:
        data = source.read()
        return (digest, perceptual_hash(decode(data))) if hashlib.sha256(data).hexdigest() == digest else None
    except ImageError:
        return None


def perceptual_hash(picture: Image.Image) -> int | None:
    """Return the 64 bits of a picture as a number, the lowest frequency first; None for one of a single color. A hash
    of a blank picture would equal that of every other."""
    import imagehash  # noqa: PLC0415 - an extra

    grey = picture.convert("L")
    low, high = grey.getextrema()
    if low == high:
        return None
    bits = imagehash.phash(grey).hash.reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def as_signs(hashes: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return hashes as rows of -1 and 1, float32 (n, 64): their inner product is 64 minus twice the bits that
    differ."""
    octets = hashes.astype(">u8").view(np.uint8).reshape(-1, HASH_BITS // 8)
    return np.unpackbits(octets, axis=1).astype(np.float32) * 2 - 1
