"""A store as compressed plain Zarr v3 with its Parquet parts: to keep or to send, not to train from. Values are those
of the store, bit for bit; any Zarr v3 reader opens it. It is no store: compressed chunks cannot be mapped, and there is
no ledger, so a shard without an entry holds the fill value."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.base.files import disk_errors, write_atomically
from mmkd.store.encoding import teacher_arrays
from mmkd.store.layout import sample_part, teacher_group
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import read_part
from mmkd.store.writer import iter_shards

CODECS = ("zstd", "blosc", "gzip")
"""zstd: level 19. blosc: zstd of bit-shuffled values, level 9. gzip: level 9. CRC32C comes last in each."""


@dataclass(frozen=True)
class ArchiveReport:
    """Savings of an archive."""

    arrays: int
    stored: int
    """Bytes of the arrays' values, uncompressed."""
    archived: int
    """Bytes of the arrays' chunks in the archive."""


def export_archive(store: FeatureStore, out: Path, codec: str) -> ArchiveReport:
    """Write `OUT` as a Zarr v3 hierarchy with the store's arrays, its cards as attributes, and `samples/`. Raises
    CorruptStoreError if a chunk differs from its ledger entry; nothing unchecked is archived; StoreError if `out`
    cannot be written. `store`: what is archived; scales of int8 are arrays of their own, as in the store. `out`: a new
    folder. `codec`: one of `CODECS`."""
    import zarr  # noqa: PLC0415 - slow to import, and only archives are written by zarr itself

    record, stored, arrays = store.record, 0, 0
    with disk_errors(out):
        attributes = {"mmkd_archive": {"codec": codec, "record": record.model_dump(mode="json")}}
        root = zarr.create_group(out, attributes=attributes)
        for slug, card in store.teachers.items():
            document = json.loads(card.model_dump_json())
            group = root.create_group(teacher_group(slug), attributes={"mmkd_archive": {"card": document}})
            for spec in teacher_arrays(card.encoding, card.dim):
                source = store.array(slug, spec)
                target = group.create_array(
                    spec.name,
                    shape=spec.shape(len(store)),
                    chunks=spec.shape(record.rows_per_shard),
                    dtype=spec.dtype,
                    fill_value=spec.fill,
                    compressors=_codecs(codec),
                )
                arrays += 1
                for shard, span in enumerate(iter_shards(record)):
                    if source.chunks[shard] is not None:
                        target[span.start : span.stop] = source.body(shard)[: len(span)]
                        stored += spec.chunk_bytes(len(span))
        for shard in range(store.shards):
            read_part(store.root, shard)
            write_atomically(out / sample_part(shard), (store.root / sample_part(shard)).read_bytes())
        archived = sum(path.stat().st_size for path in (out / "teachers").rglob("c/**/*") if path.is_file())
    return ArchiveReport(arrays, stored, archived)


def _codecs(name: str) -> list[Any]:
    from zarr import codecs  # noqa: PLC0415

    made = {
        "zstd": lambda: codecs.ZstdCodec(level=19),
        "blosc": lambda: codecs.BloscCodec(cname="zstd", clevel=9, shuffle="bitshuffle"),
        "gzip": lambda: codecs.GzipCodec(level=9),
    }
    return [made[name](), codecs.Crc32cCodec()]
