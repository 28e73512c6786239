"""Exports that nothing imports again: one Parquet table, safetensors files, a compressed Zarr archive."""

import io
import json
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmkd.base.files import disk_errors, write_atomically
from mmkd.store.array import consecutive
from mmkd.store.convert.losses import every_row, refuse_losses, store_losses
from mmkd.store.encoding import CosineError, all_errors, cosine_error
from mmkd.store.layout import TOWERS, sample_part, teacher_group
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import in_rows, part_bytes, read_part
from mmkd.store.writer import iter_shards

_FILE_BYTES = 1 << 28


def export_parquet(store: FeatureStore, out: Path, allow_loss: Collection[str] = ()) -> int:
    """Write `OUT/data/train-*.parquet` as Hugging Face `datasets` reads it, one file per shard; return how many.
    Features follow the sample columns as lists `<slug>_image` and `<slug>_text`, null where missing. The schema's
    metadata `mmkd` hold the store's record and cards. Raises UserError for a loss that is not allowed."""
    refuse_losses("parquet", store_losses(store, every_row(store), store.teachers), allow_loss)
    cards = [card.model_dump(mode="json") for card in store.teachers.values()]
    noted = {"mmkd": json.dumps({"record": store.record.model_dump(mode="json"), "cards": cards})}
    valid = {slug: store.valid(slug) for slug in store.teachers}
    for shard, span in enumerate(iter_shards(store.record)):
        table = store.sample_table(filter=in_rows(span))
        rows = slice(span.start, span.stop)
        for slug in store.teachers:
            for tower, bit in store.card(slug).sound_bits.items():
                values = np.ascontiguousarray(consecutive(store.features(slug, tower), rows))
                missing = pa.array(valid[slug][rows] & bit == 0)
                column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1], mask=missing)
                name = f"{slug}_{tower}"
                while name in table.column_names:  # a label of this name
                    name += "_features"
                table = table.append_column(name, column)
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(noted), buffer, compression="zstd")
        write_atomically(out / "data" / f"train-{shard:05d}-of-{store.shards:05d}.parquet", buffer.getbuffer())
    return store.shards


def encode_safetensors(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file: eight bytes of header length, a JSON header that ends at a multiple of
    eight, the tensors' bytes (huggingface/safetensors, README "Format")."""
    types = {"float16": "F16", "float32": "F32", "uint8": "U8", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, values in tensors.items():
        kind, end = types[values.dtype.name], offset + values.nbytes
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    bodies = (np.ascontiguousarray(v, dtype=v.dtype.newbyteorder("<")).tobytes() for v in tensors.values())
    return struct.pack("<Q", len(text)) + text + b"".join(bodies)


def export_safetensors(store: FeatureStore, out: Path, allow_loss: Collection[str] = ()) -> int:
    """Write `OUT/<slug>/sssss.safetensors` with `row`, the towers' features and `valid`, and the sample rows as they
    are in the store, `OUT/samples/sssss.parquet`; return the number of files of features. Raises UserError for a loss
    that is not allowed."""
    refuse_losses("safetensors", store_losses(store, every_row(store), store.teachers), allow_loss)
    _copy_samples(store, out)
    for slug, card in store.teachers.items():
        valid = store.valid(slug)
        for shard, span in enumerate(iter_shards(store.record)):
            rows = slice(span.start, span.stop)
            tensors: dict[str, NDArray[Any]] = {"row": np.arange(span.start, span.stop)}
            tensors |= {tower: consecutive(store.features(slug, tower), rows) for tower in card.towers}
            tensors["valid"] = valid[rows]
            metadata = {"teacher": slug, "digest": card.digest, "card": card.model_dump_json()}
            write_atomically(out / slug / f"{shard:05d}.safetensors", encode_safetensors(tensors, metadata))
    return store.shards * len(store.teachers)


@dataclass(frozen=True)
class ArchiveReport:
    """Arrays of an archive; bytes of their values, and of their files in the archive; what rounding cost, over all."""

    arrays: int
    stored: int
    archived: int
    error: CosineError | None


def export_archive(
    store: FeatureStore, out: Path, codec: str, allow_loss: Collection[str] = (), keep_bits: int | None = None
) -> ArchiveReport:
    """Write the store as compressed plain Zarr v3 with its Parquet parts into the new folder `out`: to keep or to send.
    It is no store: compressed chunks cannot be mapped, and a shard without an entry holds the fill value. `codec`: of
    `CODECS`. `keep_bits`: round floats to this many bits of their mantissa. Raises CorruptStoreError if a chunk differs
    from its ledger entry; StoreError if `out` cannot be written; UserError for a loss that is not allowed."""
    refuse_losses("the archive", store_losses(store, every_row(store), store.teachers), allow_loss)
    import zarr  # noqa: PLC0415 - slow to import, and only archives are written by zarr itself
    from zarr import codecs  # noqa: PLC0415

    compressor: Any = {
        "blosc": lambda: codecs.BloscCodec(cname="zstd", clevel=5, shuffle="shuffle"),
        "zstd": lambda: codecs.ZstdCodec(level=19),
        "gzip": lambda: codecs.GzipCodec(level=9),
    }[codec]()
    record, stored, arrays = store.record, 0, 0
    errors: list[tuple[CosineError | None, int]] = []
    with disk_errors(out):
        noted = {"codec": codec, "keep_bits": keep_bits, "record": record.model_dump(mode="json")}
        root = zarr.create_group(out, attributes={"mmkd_archive": noted})
        for slug, card in store.teachers.items():
            document = card.model_dump(mode="json")
            group = root.create_group(teacher_group(slug), attributes={"mmkd_archive": {"card": document}})
            for spec in card.arrays:
                source, per_shard = store.array(slug, spec), record.rows_per_shard
                per_file = _shards_per_file(spec.chunk_bytes(per_shard), record.shards_per_pack)
                target = group.create_array(
                    spec.name,
                    shape=spec.shape(len(store)),
                    chunks=spec.shape(per_shard),
                    shards=spec.shape(per_shard * per_file),
                    dtype=spec.dtype,
                    fill_value=spec.fill,
                    compressors=[compressor, codecs.Crc32cCodec()],
                    dimension_names=["row", "feature"][: len(spec.shape(1))],
                )
                arrays += 1
                for first in range(0, store.shards, per_file):
                    shards = range(first, min(first + per_file, store.shards))
                    bodies = [source.body(shard) for shard in shards]
                    if keep_bits is not None and spec.name in TOWERS and spec.dtype != "int8":
                        bodies = [_rounded(body, keep_bits, errors) for body in bodies]
                    rows = slice(first * per_shard, min(shards.stop * per_shard, len(store)))
                    target[rows] = np.concatenate(bodies)[: rows.stop - rows.start]
                vouched = (record.shard_rows(shard) for shard, crc in enumerate(source.checksums) if crc)
                stored += sum(spec.chunk_bytes(len(rows)) for rows in vouched)
        error = all_errors(errors) if errors else None
        root.attrs["mmkd_archive"] = noted | {"error": error and error.model_dump()}
        _copy_samples(store, out)
        archived = sum(path.stat().st_size for path in (out / "teachers").rglob("c/**/*") if path.is_file())
    return ArchiveReport(arrays, stored, archived, error)


def _shards_per_file(chunk_bytes: int, most: int) -> int:
    """Return the power of two of shards that are encoded together in memory and become one file."""
    return int(min(most, 1 << (max(1, _FILE_BYTES // chunk_bytes).bit_length() - 1)))


def _rounded(values: NDArray[Any], keep_bits: int, errors: list[tuple[CosineError | None, int]]) -> NDArray[Any]:
    """Round to the nearest value with so many bits of the mantissa (Klöwer et al. 2021, doi:10.1038/s43588-021-00156-2)
    and add what it cost to `errors`; what has no more bits, or would become infinite, stays."""
    from numcodecs import BitRound  # noqa: PLC0415 - slow to import

    if keep_bits >= np.finfo(values.dtype).nmant:
        return values
    rounded = BitRound(keep_bits).encode(values).view(values.dtype).reshape(values.shape)
    rounded, sound = np.where(np.isfinite(rounded), rounded, values), ~np.isnan(values[:, 0])
    errors.append((cosine_error(values, rounded, sound), int(sound.sum())))
    return rounded


def _copy_samples(store: FeatureStore, out: Path) -> None:
    for shard in range(store.shards):
        read_part(store.root, shard)
        write_atomically(out / sample_part(shard), part_bytes(store.root, shard))
