"""`mmkd store import` and `mmkd store export`: convert from and to other layouts."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mmkd.base.errors import ConfigError, CorpusError, StoreError
from mmkd.base.files import list_folder
from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted
from mmkd.cli.params import ALLOW_LOSS, ANY_PATH, JSON, STORE_PATH, echo, progress_bar
from mmkd.store import FeatureStore
from mmkd.store.convert.clip_retrieval import ClipRetrievalFolder, export_npy
from mmkd.store.convert.exports import export_archive, export_parquet, export_safetensors
from mmkd.store.convert.importing import FeatureSource, import_features
from mmkd.store.convert.original import FILES, OriginalRelease
from mmkd.store.layout import CODECS, ENCODINGS, Encoding

if TYPE_CHECKING:
    from mmkd.store.convert.original_export import ImageMode, OriginalReport


@click.command("import")
@click.argument("original", type=ANY_PATH)
@STORE_PATH
@click.option(
    "--features",
    type=click.Choice(["clips_output", "clips_project_output"]),
    default="clips_output",
    help="File of the original release: the teachers' own features, or those mapped to 512 values.",
)
@click.option(
    "--encoding",
    type=click.Choice(ENCODINGS),
    help="float16 takes half the space of float32, int8 a quarter.  [default: one that keeps every value]",
)
@click.option("--name", default="clip-retrieval", help="Name of the teacher of a clip-retrieval folder or of bags.")
@ALLOW_LOSS
@JSON
def import_(
    original: Path,
    path: StorePath,
    features: str,
    encoding: Encoding | None,
    name: str,
    allow_loss: tuple[str, ...],
    as_json: bool,
) -> None:
    """Import features made by other tools into a store. Run again to continue.

    ORIGINAL is the original MMKD-CLIP release, a folder of clip-retrieval, a folder of bags (CLAM, TRIDENT), or
    the description of an evaluation set of bags, which adds diagnoses, follow-up and folds."""
    with progress_bar("shard", hidden=as_json) as progress:
        report = import_features(_source(original, features, name, allow_loss), path, encoding, progress)
    written, failed = counted(report.shards, "shard"), counted(report.failed, "row")
    line = f"{counted(report.rows, 'row')} in {path}; {written} written, {failed} failed"
    echo(as_json, asdict(report), [line])


def _source(original: Path, features: str, name: str, allow_loss: tuple[str, ...] = ()) -> FeatureSource:
    if (original / "meta.jsonl").is_file():
        return OriginalRelease(original, features)
    if (original / "metadata").is_dir():
        return ClipRetrievalFolder(original, name)
    if (described := original.suffix in (".yaml", ".yml")) or list_folder(original, "*.h5"):
        from mmkd.store.convert.bags import BagFolder

        if not described:
            return BagFolder(original, name, None, allow_loss)
        from mmkd.extract.corpora.opening import read_bags

        folder, table = read_bags(original)
        return BagFolder(folder, name, table, allow_loss)
    raise CorpusError(
        f"{original} holds neither meta.jsonl (the original release), metadata/ (clip-retrieval) nor *.h5 "
        "(bags of CLAM or TRIDENT); name such a folder"
    )


@click.command()
@STORE_PATH
@click.argument("out", type=ANY_PATH)
@click.option(
    "--layout",
    type=click.Choice(["npy", "parquet", "safetensors", "original", "zarr"]),
    required=True,
    help="npy is the layout of clip-retrieval and embedding-reader.",
)
@click.option(
    "--file",
    type=click.Choice(["output", "project", "both"]),
    help="Feature file of --layout original.  [default: as imported]",
)
@click.option(
    "--images",
    type=click.Choice(["link", "copy", "none"]),
    default="none",
    help="For --layout original: put the images below OUT, where the release's loader looks for them.",
)
@ALLOW_LOSS
@click.option("--codec", type=click.Choice(CODECS), help="Compression of --layout zarr.")
@click.option(
    "--keep-bits",
    type=click.IntRange(1, 22),
    help="For --layout zarr: round features to this many bits of the mantissa; float16 has 10.  [default: all]",
)
def export(
    path: StorePath,
    out: Path,
    layout: str,
    file: str | None,
    images: "ImageMode",
    allow_loss: tuple[str, ...],
    codec: str | None,
    keep_bits: int | None,
) -> None:
    """Write a store's features in another layout, into a new folder."""
    if (codec is not None) != (layout == "zarr"):
        raise ConfigError("--codec and --layout zarr belong together, for example --layout zarr --codec zstd")
    if keep_bits is not None and layout != "zarr":
        raise ConfigError("--keep-bits belongs to --layout zarr")
    if (file is not None or images != "none") and layout != "original":
        raise ConfigError("--file and --images belong to --layout original")
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise StoreError(f"{out} is there already; name a new folder for the export")
    source = FeatureStore.open(path)
    writers = {"npy": export_npy, "parquet": export_parquet, "safetensors": export_safetensors}
    if layout in writers:
        what = counted(writers[layout](source, out, allow_loss), "part" if layout == "npy" else "file")
    elif codec is not None:
        report = export_archive(source, out, codec, allow_loss, keep_bits)
        share = report.archived / max(report.stored, 1)
        what = f"{report.arrays} arrays, {report.archived:,} bytes ({share:.1%} of {report.stored:,})"
        if error := report.error:
            what += f", rounded (1 - cosine: mean {error.mean:.1e}, worst {error.worst:.1e})"
    else:
        from mmkd.store.convert.original_export import export_original, imported_files

        files = {None: None, "output": FILES[:1], "project": FILES[1:], "both": FILES}[file]
        what = _original_counts(export_original(source, out, files, images, allow_loss), images)
        if "clips_project_output" not in (files or imported_files(source)):
            what += " (the release's loader reads clips_project_output.pt alone: --file project or both)"
    click.echo(f"{what} written to {out}")


def _original_counts(done: "OriginalReport", images: "ImageMode") -> str:
    what, incomplete = counted(done.samples, "sample"), f"{done.incomplete:,} without both features of any teacher"
    what += f" ({counted(done.left_out, 'row')} without any feature left out)" if done.left_out else ""
    what += f" ({incomplete}: the release's loader fails on them)" if done.incomplete else ""
    what += f", {counted(done.images, 'image')}" if images != "none" else ""
    return what + (f" ({done.images_missing:,} missing)" if done.images_missing else "")
