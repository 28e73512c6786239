"""Content of the page, gathered from the store before drawing."""

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from mmkd.base.arrays import Bools, Ints, Singles
from mmkd.base.images.source import ImageError
from mmkd.store.inspect.findings import Finding, statistics_findings, store_findings
from mmkd.store.inspect.info import StoreInfo, store_info
from mmkd.store.inspect.outliers import MIN_ROWS, Outlier, outliers, standard_scores
from mmkd.store.inspect.pairs import NOT_STATED, pair_cosines
from mmkd.store.inspect.pictures import NO_IMAGE, picture, thumbnail
from mmkd.store.inspect.projection import Method, Projection, project
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.sampling import draw_inputs, draw_rows
from mmkd.store.inspect.statistics import SAMPLE_ROWS, StoreStatistics, store_statistics
from mmkd.store.reader import FeatureStore

MAP_ROWS = 600
"""Points of a map: a pointer finds them one by one, and their thumbnails stay within the page's size."""
FAILURE_ROWS = 30
SHOWN_ROWS = 6
"""Rows of the map that are shown with picture, caption and cosines, so that a printed page has some too."""
COLORINGS = ("modality", "status", "teachers", "best teacher")
"""Colorings of every map; a label of the same name is told apart."""
NAMED = 2
"""Teachers that are named where at most this many lack a row."""
CAPTION_CHARACTERS = 300
THUMBNAIL_SIDE = 80
THUMBNAIL_BYTES = 2_000_000
"""Limit of all thumbnails before base64; with 4.8 MB of plotly.js any page stays below 10 MB."""


@dataclass(frozen=True)
class Sample:
    """A row as the page shows it."""

    row: int
    key: str
    caption: str
    modality: str
    status: str
    reason: str
    thumbnail: str | None
    """JPEG as base64, or None."""
    no_picture: str


@dataclass(frozen=True)
class Content:
    """All that the page needs; drawing reads nothing else."""

    info: StoreInfo
    statistics: StoreStatistics
    findings: tuple[Finding, ...]
    projections: tuple[Projection, ...]
    outliers: tuple[Outlier, ...]
    shown: dict[int, dict[str, float]]
    """Some rows drawn at random: each teacher's cosine of the image with its caption, where it has both."""
    failures: tuple[int, ...]
    samples: dict[int, Sample]
    colors: dict[str, dict[int, str]]
    """Map coloring: name to row to value. Label columns have 2 to 12 values in the sample."""
    pictures_missing: int
    """Rows of the page that name a picture which cannot be shown."""


@dataclass(frozen=True)
class Options:
    """User options of the page."""

    teachers: tuple[str, ...] | None = None
    sample: int | None = SAMPLE_ROWS
    """Rows for the statistics; every row when None."""
    seed: int = 0
    projection: Method = "pca"


def gather(store: FeatureStore, options: Options, progress: Callable[[str], None] | None = None) -> Content:
    """Gather the content of the page; `progress` takes each step's name. Missing pictures are no error. Raises
    UserError for an unknown teacher, an empty sample, or if UMAP is not installed; CorruptStoreError if the store
    cannot be read."""
    say = progress or (lambda _: None)
    say("ledger and samples")
    info = store_info(store)
    say("statistics")
    statistics = store_statistics(store, options.teachers, options.sample, options.seed)
    slugs = tuple(dict.fromkeys(each.slug for each in statistics.towers))
    rows = draw_inputs(store, MAP_ROWS, options.seed)
    say("maps")
    places = [(slug, tower) for slug in slugs for tower in store.card(slug).towers]
    maps = (project(store, slug, tower, rows, options.projection, options.seed) for slug, tower in places)
    projections = tuple(found for found in maps if len(found.rows))
    drawn = draw_inputs(store, options.sample, options.seed)
    odd = outliers(store, slugs, drawn[:: max(1, len(drawn) // SAMPLE_ROWS)])
    bad = store.sample_table(["row"], pads.field("status").isin(["failed", "partial"]))["row"]
    failures = tuple(bad.slice(0, FAILURE_ROWS).to_pylist())
    say("pictures")
    cosines = pair_cosines(store, slugs, rows)
    first = (*failures, *(outlier.row for outlier in odd))
    table = sample_rows(store, np.array(sorted({*rows.tolist(), *first}), dtype=np.int64))
    samples = _samples(store, table, first)
    shown = {}
    for row in draw_rows(rows, SHOWN_ROWS, options.seed).tolist():
        own = zip(slugs, cosines[:, np.searchsorted(rows, row)].tolist(), strict=True)
        shown[row] = {slug: value for slug, value in own if math.isfinite(value)}
    return Content(
        info=info,
        statistics=statistics,
        findings=(*store_findings(info), *statistics_findings(statistics)),
        projections=projections,
        outliers=odd,
        shown=shown,
        failures=failures,
        samples=samples,
        colors={
            "modality": {row: sample.modality for row, sample in samples.items()},
            "status": {row: ": ".join(filter(None, (each.status, each.reason))) for row, each in samples.items()},
            **teacher_colors(store, slugs, rows, cosines),
            **_label_colors(table, store.record.labels),
        },
        pictures_missing=sum(sample.no_picture not in ("", NO_IMAGE) for sample in samples.values()),
    )


def _samples(store: FeatureStore, table: pa.Table, first: Sequence[int]) -> dict[int, Sample]:
    """Return samples by row; rows in `first` get their thumbnails before the room runs out."""
    rows = {row["row"]: row for row in table.to_pylist()}
    room, samples = THUMBNAIL_BYTES, {}
    for number in dict.fromkeys((*first, *rows)):
        row, data, reason = rows[number], b"", "no room left on this page"
        if room > 0:
            try:
                data, reason = thumbnail(picture(store.record, row), THUMBNAIL_SIDE), ""
            except ImageError as error:
                reason = str(error)
            room -= len(data)
        caption = " ".join((row["caption"] or "").split())
        samples[number] = Sample(
            row=number,
            key=row["key"],
            caption=caption if len(caption) <= CAPTION_CHARACTERS else caption[: CAPTION_CHARACTERS - 1] + "…",
            modality=_stated(row["modality"]),
            status=row["status"],
            reason=row["reason"] or "",
            thumbnail=base64.b64encode(data).decode() or None,
            no_picture=reason,
        )
    return samples


def _stated(value: str | None) -> str:
    return value if value and value.strip() else NOT_STATED


def _label_colors(table: pa.Table, labels: Sequence[str]) -> dict[str, dict[int, str]]:
    titles = {name: f"label {name}" if name in COLORINGS else name for name in labels}
    return {
        title: dict(zip(table["row"].to_pylist(), map(_stated, table[name].to_pylist()), strict=True))
        for name, title in titles.items()
        if 2 <= pc.count_distinct(table[name]).as_py() <= 12
    }


def teacher_colors(
    store: FeatureStore, slugs: Sequence[str], rows: Ints, cosines: Singles
) -> dict[str, dict[int, str]]:
    """Return colorings as name to row to value: which teachers have a row, and the teacher whose cosine stands out most
    from its own others (by standard scores; needs two teachers with 20 rows). `rows`: int64 (n,); `cosines`: float32
    (teachers, n) of images with their captions, NaN where a teacher lacks one of both."""
    has = np.array([store.valid(slug)[rows] != 0 for slug in slugs]).reshape(len(slugs), len(rows))
    found = {"teachers": {int(row): _presence(slugs, has[:, i]) for i, row in enumerate(rows)}}
    compared = [i for i in range(len(slugs)) if np.isfinite(cosines[i]).sum() >= MIN_ROWS]
    if len(compared) > 1:
        scores = np.full(cosines.shape, -np.inf)
        for i in compared:
            there = np.isfinite(cosines[i])
            scores[i, there] = standard_scores(cosines[i, there].astype(np.float64))
        best = scores.argmax(axis=0)
        found["best teacher"] = {
            int(row): slugs[best[i]] if np.isfinite(scores[:, i]).any() else "none" for i, row in enumerate(rows)
        }
    return found


def _presence(slugs: Sequence[str], has: Bools) -> str:
    lacking = [slug for slug, there in zip(slugs, has, strict=True) if not there]
    if len(lacking) in (0, len(slugs)):
        return "none" if lacking else "all"
    few = len(lacking) <= NAMED
    return f"all but {', '.join(lacking)}" if few else f"{len(slugs) - len(lacking)} of {len(slugs)}"
