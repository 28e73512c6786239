"""Export of a store in the layout of the original MMKD-CLIP release, as its loader reads it."""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmkd.base.errors import CorpusError
from mmkd.base.files import TEMPORARY_SUFFIX, disk_errors, write_atomically
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source, leaves_root
from mmkd.base.text import counted
from mmkd.store.convert.losses import Loss, every_row, refuse_linked, refuse_losses, store_losses
from mmkd.store.convert.original import FILES, KIND, LINE, SUFFIXES
from mmkd.store.convert.torch_file import write_tensors
from mmkd.store.layout import PAIR_SOUND
from mmkd.store.reader import FeatureStore
from mmkd.store.samples import in_rows
from mmkd.store.writer import iter_shards

ImageMode = Literal["link", "copy", "none"]


@dataclass
class OriginalReport:
    """Counts of one export in the release's layout."""

    samples: int = 0
    left_out: int = 0
    """Rows without any feature."""
    images: int = 0
    images_missing: int = 0
    """Samples whose image could not be copied; their `imgpath` names a file that is not there."""
    incomplete: int = 0
    """Samples of which no teacher has both features: their `available_clips` is empty, the release's loader fails."""


def export_original(
    store: FeatureStore,
    out: Path,
    files: Sequence[str] | None = None,
    images: ImageMode = "none",
    allow_loss: Collection[str] = (),
) -> OriginalReport:
    """Write a store in the release's layout, float32, into the new folder `out`. `files`: among `FILES`, by default
    `imported_files`. `images`: `link` makes symbolic links to files and copies members of archives. Raises UserError
    for a loss that is not allowed; CorpusError for a key that cannot name a folder, or two that would name the same;
    StoreError if `out` cannot be written."""
    names = {
        slug: card.source.rpartition(":")[2] if card.source.startswith(f"{KIND}:") else slug
        for slug, card in store.teachers.items()
    }
    valid = {slug: store.valid(slug) for slug in names}
    refuse_losses("the release's layout", _losses(store, names, valid), allow_loss)
    files = files or imported_files(store)
    out.mkdir(parents=True, exist_ok=True)
    further = ("modality", *(label for label in store.record.labels if label not in LINE))
    unfinished, report = out / f".meta.jsonl{TEMPORARY_SUFFIX}", OriginalReport()
    with disk_errors(out), unfinished.open("w", encoding="utf-8") as lines:
        for span in iter_shards(store.record):
            for row in store.sample_table(filter=in_rows(span)).to_pylist():
                tensors, complete = _row_tensors(store, names, valid, row)
                if not tensors:
                    report.left_out += 1
                    continue
                folder, name = _folder_and_id(row["key"])
                for file in files:
                    path = out / "features" / folder / name / f"{file}.pt"
                    if path.exists():
                        raise CorpusError(f"key {row['key']!r} and another one would both be written to {path.parent}; "
                                          "give the samples other keys")  # fmt: skip
                    write_atomically(path, write_tensors(tensors, file))
                image = row["uri"]
                if image is not None and images != "none":
                    image, copied = _copy_image(store, row, out, f"images/{folder}/{name}", images)
                    report.images += copied
                    report.images_missing += not copied
                line = {"folderid": folder, "id": name, "imgpath": image, "metapath": row.get("metapath")}
                line |= {"txt": row["caption"], "available_clips": complete}
                line |= {label: row[label] for label in further if row[label] is not None}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                report.samples += 1
                report.incomplete += not complete
    unfinished.replace(out / "meta.jsonl")
    return report


def _losses(store: FeatureStore, names: dict[str, str], valid: dict[str, NDArray[np.uint8]]) -> Iterator[Loss]:
    """Yield what the release has no place for. Raises CorpusError for a key that cannot name a folder; UserError as
    `refuse_linked`."""
    rows = every_row(store)
    refuse_linked("the release's layout", store, rows)
    yield from store_losses(store, rows, names)
    if known := [slug for slug, card in store.teachers.items() if not card.source.startswith(f"{KIND}:")]:
        yield "cards", f"the cards of {', '.join(known)} (the release has names alone)"
    written = np.any([bits != 0 for bits in valid.values()], axis=0) if names else np.zeros(len(store), dtype=bool)
    if left_out := int((~written[rows]).sum()):
        yield "rows", f"{counted(left_out, 'row')} that no teacher has a feature of"
    placed = {"row", "key", "caption", "modality", "uri", "metapath"} | (set(store.record.labels) - LINE)
    lost, changed = Counter[str](), []
    for span in iter_shards(store.record):
        table = store.sample_table(filter=in_rows(span))
        for row in table.filter(pa.array(written[span.start : span.stop])).to_pylist():
            folder, name = _folder_and_id(row["key"])
            changed += [(row["key"], f"{folder}/{name}")] * (row["key"] != f"{folder}/{name}")
            complete = [name for slug, name in _ordered(names, row) if valid[slug][row["row"]] == PAIR_SOUND]
            again = {"status": "ok", "folderid": folder, "available_clips": ",".join(complete)}
            lost.update(column for column in row.keys() - placed if row[column] not in (None, again.get(column)))
    if lost:
        columns = (f"{column} of {counted(lost[column], 'row')}" for column in table.column_names if lost[column])
        yield "columns", f"the column values {', '.join(columns)}"
    if changed:
        yield "keys", f"the keys of {counted(len(changed), 'row')} ({changed[0][0]!r} becomes {changed[0][1]!r})"


def imported_files(store: FeatureStore) -> tuple[str, ...]:
    """Return the feature file that the store was imported from; `clips_output` for any other store."""
    sources = (card.source.split(":") for card in store.teachers.values())
    found = {parts[1].removesuffix(".pt") for parts in sources if parts[0] == KIND and len(parts) == 3}
    return tuple(file for file in FILES if file in found) or FILES[:1]


def _copy_image(store: FeatureStore, row: dict[str, Any], out: Path, name: str, images: str) -> tuple[str, bool]:
    """Return the path below `out` of a row's image (a plain relative one is kept), and whether it could be copied."""
    uri, root = row["uri"], store.record.image_root(row["row"])
    plain = not leaves_root(root, uri) and "#" not in uri and row["offset"] is None and ".." not in Path(uri).parts
    path = uri if plain and not Path(uri).is_absolute() else name + PurePosixPath(uri.partition("#")[0]).suffix
    target, source = out / path, Path(root) / uri
    if plain and images == "link" and "://" not in root and source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_symlink():
            target.symlink_to(source.resolve())
        return path, True
    try:
        write_atomically(target, image_source(root, uri, row["offset"], row["length"]).read())
    except ImageError:
        return path, False
    return path, True


def _row_tensors(
    store: FeatureStore, names: dict[str, str], valid: dict[str, NDArray[np.uint8]], row: dict[str, Any]
) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Return one row's features under the release's names, and the teachers that have both, in imported order."""
    tensors, complete = {}, []
    for slug, name in _ordered(names, row):
        bits = valid[slug][row["row"]]
        for tower, bit in store.card(slug).sound_bits.items():
            if bits & bit:
                tensors[f"{name}_{SUFFIXES[tower]}"] = store.features(slug, tower)[row["row"]].astype(np.float32)
        if bits == PAIR_SOUND:
            complete.append(name)
    return tensors, complete


def _ordered(names: dict[str, str], row: dict[str, Any]) -> list[tuple[str, str]]:
    order = {name: place for place, name in enumerate((row.get("available_clips") or "").split(","))}
    return sorted(names.items(), key=lambda item: order.get(item[1], len(order)))


def _folder_and_id(key: str) -> tuple[str, str]:
    folder, _, name = key.rpartition("/")
    return _folder_name(folder or "mmkd"), _folder_name(name)


def _folder_name(part: str) -> str:
    name = part.replace("/", "_")
    if not name.strip(".") or "\0" in name:
        raise CorpusError(f"key {part!r} cannot name a folder of the release's layout; give the samples other keys")
    return name
