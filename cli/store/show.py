"""`mmkd store show` and `mmkd store neighbors`: one row, one shard, nearest rows."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from mmkd.base.errors import ConfigError, TeacherError, UserError
from mmkd.base.install import import_extra
from mmkd.base.places.remote import StorePath
from mmkd.base.text import counted, number, table_lines
from mmkd.cli.params import ANY_PATH, JSON, SEED, STORE_PATH, TEACHERS, Names, echo
from mmkd.store import FeatureStore
from mmkd.store.inspect import neighbors as search
from mmkd.store.inspect.rows import find_row, find_shard
from mmkd.store.inspect.show import RowView, ShardView, view_row, view_shard
from mmkd.store.layout import TOWERS

if TYPE_CHECKING:
    from PIL import Image


CAPTION_CHARACTERS = 100
HEIGHT_LINES = 24


@click.command()
@STORE_PATH
@click.argument("what", metavar="KEY|ROW|shard:N")
@click.option("--image", is_flag=True, help="Draw the picture in the terminal.")
@TEACHERS
@SEED
@JSON
def show(path: StorePath, what: str, image: bool, teachers: Names, seed: int, as_json: bool) -> None:
    """One row (sample, norms, cosine, rank among random rows, neighbors) or one shard.

    A key takes precedence over a row number; `row:12` is always a number.
    """
    source = FeatureStore.open(path)
    shard = find_shard(source, what)
    if shard is not None:
        seen = view_shard(source, shard)
        content = asdict(seen) | {"entries": {slug: e and e.model_dump() for slug, e in seen.entries.items()}}
        echo(as_json, content, _shard_lines(source, seen))
        return
    view = view_row(source, find_row(source, what), teachers, seed=seed)
    echo(as_json, asdict(view), _row_lines(view))
    if image:
        from mmkd.base.images.source import ImageError
        from mmkd.store.inspect.pictures import picture

        try:
            draw(picture(source.record, view.sample))
        except ImageError as error:
            click.echo(f"no picture: {error}")


@click.command()
@STORE_PATH
@click.argument("key", metavar="[KEY|ROW]", required=False)
@click.option("--text", help="Words to search for, encoded by the teacher.")
@click.option("--image", type=ANY_PATH, help="Picture to search for, encoded by the teacher.")
@click.option("--teacher", required=True, help="Name in the store; NAME=local-dir:/path if its weights are elsewhere.")
@click.option("--among", type=click.Choice(["image", "text"]), default="image", help="Features to search.")
@click.option("--top", default=10, help="Number of rows to list.")
@JSON
def neighbors(
    path: StorePath,
    key: str | None,
    text: str | None,
    image: Path | None,
    teacher: str,
    among: str,
    top: int,
    as_json: bool,
) -> None:
    """Rows nearest to a row's image, to words, or to a picture: exact, over every input."""
    if [key, text, image].count(None) != 2:
        raise ConfigError("name one thing to look near: a KEY or ROW, --text WORDS, or --image FILE")
    source = FeatureStore.open(path)
    slug = teacher.partition("=")[0]
    source.card(slug)
    query = _stored_query(source, slug, key) if key is not None else _encoded_query(source, teacher, text, image)
    table = search.neighbors(source, slug, "image" if among == "image" else "text", query, top)
    searched = sum(len(span.rows) for span in source.record.input_spans)
    title = f"nearest {among}s of {slug} among {counted(searched, 'row')}, by cosine"
    rows = [
        (str(row["rank"]), str(row["row"]), number(row["cosine"], 4), row["key"], _short(row["caption"]))
        for row in table.to_pylist()
    ]
    lines = table_lines(("rank", "row", "cosine", "key", "caption"), rows, words=("rank", "key", "caption"))
    echo(as_json, table.to_pylist(), (title, *lines))


def _stored_query(source: FeatureStore, slug: str, key: str) -> NDArray[np.floating[Any]]:
    row = find_row(source, key)
    bits = source.valid(slug)[row]
    tower = next((tower for tower, bit in source.card(slug).sound_bits.items() if bits & bit), None)
    if tower is None:
        raise ConfigError(f"{slug} has no feature of row {row}; `mmkd store show {source.root} row:{row}` says why")
    return source.features(slug, tower)[row]


def _encoded_query(
    source: FeatureStore, teacher: str, text: str | None, image: Path | None
) -> NDArray[np.floating[Any]]:
    """Encode with the teacher's own weights, refusing any but those that made the store."""
    import torch

    from mmkd.base.images.uri import image_source
    from mmkd.extract.decoding import decode_image, read_image
    from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
    from mmkd.extract.teachers.geometry import geometry_of

    slug = teacher.partition("=")[0]
    place = source.card(slug).source
    # The card says where the weights came from; they are looked for there when the user names no other place.
    known = "=" not in teacher and place.startswith(("local-dir:", "hf-hub:"))
    (spec, *more) = parse_teachers(f"{slug}={place}" if known else teacher)
    if more:
        raise TeacherError(f"--teacher {teacher!r} names {1 + len(more)} teachers; one at a time")
    card, stored = describe_teacher(spec), source.card(spec.slug)
    stored.tower_arrays("image" if text is None else "text")
    if card.digest != stored.digest:
        raise TeacherError(
            f"{spec.slug} at {card.source} has digest {card.digest}, the store was made with {stored.digest} "
            f"({stored.source}); give --teacher {spec.slug}=local-dir:FOLDER of those weights"
        )
    loaded = load_teacher(spec, card, torch.device("cpu"))
    with torch.inference_mode():
        if image is None:
            encoded = loaded.encode_texts(loaded.tokenize([text or ""])[0])
        else:
            geometry = geometry_of(card.image_preprocessing)
            decoded = decode_image(*read_image(image_source(str(image.parent), image.name)), [geometry])
            if decoded.reason is not None:
                raise ConfigError(f"--image {image}: {decoded.reason.removeprefix('image: ')}; name a picture")
            encoded = loaded.encode_images(torch.from_numpy(decoded.pixels[geometry][None]))
    return encoded[0].float().numpy()


def _row_lines(view: RowView) -> Iterator[str]:
    yield f"row {view.row}, key {view.sample['key']}, shard {view.shard}"
    for name, value in view.sample.items():
        if name not in ("row", "key") and value is not None:
            yield f"  {name:12}  {value}"
    yield f"  {'corpus':12}  {view.corpus_root}"
    if not view.teachers:
        return
    rows = []
    for t in view.teachers:
        numbers = ("-" if value is None else number(value) for value in (t.image_norm, t.text_norm, t.cosine))
        ranks = (f"{rank} of {t.ranked_among}" if rank else "-" for rank in (t.caption_rank, t.image_rank))
        rows.append((t.slug if t.extracted else f"{t.slug} (not extracted)", *numbers, *ranks))
    yield from table_lines(("teacher", "image norm", "text norm", "cosine", "caption's rank", "image's rank"), rows)
    yield f"nearest rows among {view.searched:,}"
    for teacher in view.teachers:
        for near in teacher.neighbors:
            place = f"{teacher.slug} {teacher.neighbors_by}  {near.cosine:.3f}  row {near.row}  {near.key}"
            yield f"  {place}  {_short(near.caption)}"


def _shard_lines(source: FeatureStore, view: ShardView) -> Iterator[str]:
    status = ", ".join(f"{count:,} {name}" for name, count in view.status.items())
    yield f"shard {view.shard} of {source.root}: rows {view.first_row} to {view.last_row} ({status})"
    yield from (f"  {count:,} x {reason}" for reason, count in view.reasons.items())
    for slug, entry in view.entries.items():
        if entry is None:
            asked = source.record.asked_towers(view.shard, source.card(slug))
            yield f"  {slug}: {'not extracted' if asked else 'not asked'}"
        else:
            found = {tower: entry for tower in TOWERS if getattr(entry, f"{tower}_crc32c")}
            rows = ", ".join(counted(entry.sound_rows(tower), tower) for tower in found)
            yield f"  {slug}: {rows}, crc32c {' and '.join(getattr(entry, f'{tower}_crc32c') for tower in found)}"
    yield from (f"  row {row['row']}  {row['key']}  {row['status']}: {row['reason']}" for row in view.failures)


def draw(image: "Image.Image") -> None:
    """Draw a picture into the terminal by Sixel or Kitty's graphics, else half blocks. Raises UserError if standard
    output is not a terminal, or the package that draws is not installed."""
    if not sys.stdout.isatty():
        raise UserError("--image draws into a terminal, and standard output is not one; leave --image out")
    drawing = import_extra("textual_image.renderable", "terminal", "--image", ", or leave --image out")
    from rich.console import Console

    # An `auto` side follows from the other and the picture's shape: a wide picture is bound by the terminal's width.
    console = Console()
    columns = min(console.width, round(2 * HEIGHT_LINES * image.width / image.height))
    console.print(drawing.Image(image.convert("RGB"), width=max(columns, 1), height="auto"))


def _short(caption: str | None) -> str:
    words = " ".join((caption or "").split())
    return words if len(words) <= CAPTION_CHARACTERS else words[: CAPTION_CHARACTERS - 1] + "…"
