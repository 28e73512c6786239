"""Whole-slide images as bags: one row per tissue tile, labeled with its slide and patient."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import openslide
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from mmkd.base.errors import CorpusError
from mmkd.base.images.pixels import over_white
from mmkd.base.images.slides import open_slide
from mmkd.base.images.source import MAX_PIXELS
from mmkd.base.images.uri import TILE, fragment
from mmkd.base.places.reading import join
from mmkd.base.places.remote import as_root
from mmkd.base.tcga import tcga_patient
from mmkd.extract.corpora.files import SLIDES, FileCorpus
from mmkd.extract.corpora.row import CorpusRow, Part
from mmkd.extract.corpora.tabular import read_lines
from mmkd.store.record import FIXED_NAMES

# Pixels a tile is judged by, per side: tissue is coarse, and reading more costs the slide's decoding.
_CELLS = 32
# Stained tissue has color, glass and black borders have none. CLAM's default is 8 of 255 after a median; here the
# area average over a cell takes the noise away, and the same threshold with a margin keeps pale fat out.
_MIN_SATURATION = 12
_MIN_BRIGHTNESS = 25
# A slide that says 0.503 is meant when 0.5 is asked for.
_MPP_TOLERANCE = 0.1


class SlidesCorpus(FileCorpus):
    """A slide, or every slide below a folder, in the order of their paths; tiles row by row."""

    kind: Literal["slides"] = "slides"
    tile: int = Field(default=224, gt=0, le=4096)
    """Pixels of a tile's side as teachers get it."""
    mpp: float = Field(default=0.5, gt=0)
    """Micrometers per pixel of such a tile; 0.5 is 20x."""
    min_tissue: float = Field(default=0.25, ge=0, le=1)
    """Share of a tile that must be tissue."""
    slide_mpp: float | None = Field(default=None, gt=0)
    """For slides that do not say their own."""
    region: int | None = Field(default=None, gt=0)
    """Tiles along the side of a square whose tiles get the same label `region`: bags smaller than a slide."""
    slide_table: str | None = None
    """Table with a column `slide` (file name without suffix), where known `patient`, and any labels."""

    suffixes = (*SLIDES, ".tif", ".tiff")

    @property
    def labels(self) -> tuple[str, ...]:
        """`slide`, `patient`, the tile's level-0 corner `x` and `y`, its level-0 `side`, then the table's own."""
        region = () if self.region is None else ("region",)
        return ("slide", "patient", "x", "y", "side", *region, *self._table[0])

    def settings(self) -> str:
        return self.model_dump_json(exclude={"path", "slide_table"}) + repr(self._table)

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """Yield one row per tile with tissue; one failed row where the slide cannot be tiled."""
        slide_id = part.name.rpartition("/")[2].rpartition(".")[0]
        known = self._table[1].get(slide_id, {})
        labels: dict[str, str | None] = {"slide": slide_id, "patient": tcga_patient(slide_id)}
        labels |= {name: value for name, value in known.items() if value}
        try:
            slide = open_slide(str(join(self.base, part.name)), part.stamp)
            side, fault = self._side(slide)
            if fault is None:
                for x, y in tissue_tiles(slide, side, self.min_tissue):
                    if self.region is not None:
                        labels["region"] = f"{slide_id}@{x // side // self.region},{y // side // self.region}"
                    yield CorpusRow(
                        key=f"{part.name}#{x},{y}",
                        caption=None,
                        uri=part.name + fragment(TILE, x, y, side, self.tile),
                        modality="pathology",
                        labels=labels | {"x": str(x), "y": str(y), "side": str(side)},
                    )
        except (openslide.OpenSlideError, OSError, ValueError):
            open_slide.cache_clear()
            fault = "slide: damaged or not a slide"
        if fault is not None:
            yield CorpusRow(part.name, None, part.name, modality="pathology", labels=labels, fault=f"row: {fault}")

    def _side(self, slide: openslide.OpenSlide) -> tuple[int, str | None]:
        """A tile's side in level-0 pixels, or why there is none."""
        try:
            mpp = float(slide.properties.get(openslide.PROPERTY_NAME_MPP_X, self.slide_mpp or "nan"))
        except ValueError:
            mpp = math.nan
        if not 0 < mpp < math.inf:
            return 0, "slide: does not say its micrometers per pixel (set slide_mpp)"
        side = round(self.tile * self.mpp / mpp)
        if side < self.tile * (1 - _MPP_TOLERANCE):
            return 0, "slide: scanned coarser than the mpp asked for"
        if side > max(slide.dimensions):
            return 0, "slide: smaller than one tile"
        return max(side, self.tile), None

    @functools.cached_property
    def _table(self) -> tuple[tuple[str, ...], Mapping[str | None, Mapping[str, str | None]]]:
        """Further label names, and labels by slide."""
        if self.slide_table is None:
            return (), {}
        lines = read_lines(as_root(self.slide_table))
        names = list(lines[0]) if lines else []
        if "slide" not in names:
            raise CorpusError(f"{self.slide_table} has no column 'slide'; it has {', '.join(names) or 'no rows'}")
        further = tuple(name for name in names if name not in ("slide", "patient"))
        if taken := (FIXED_NAMES | {"x", "y", "side", "region"}) & set(further):
            raise CorpusError(
                f"{self.slide_table}: column {min(taken)!r} has the name of a column of the sample table; rename it"
            )
        return further, {line["slide"]: {name: line[name] for name in names if name != "slide"} for line in lines}


def tissue_tiles(slide: openslide.OpenSlide, side: int, min_tissue: float) -> Iterator[tuple[int, int]]:
    """Yield level-0 corners of the whole tiles of a grid from (0, 0) on whose share of tissue is enough, row by row.
    Raises ValueError if the slide has no level that is coarse enough for a row of tiles to be read at once."""
    width, height = slide.dimensions
    across = width // side
    level = slide.get_best_level_for_downsample(max(1.0, side / _CELLS))
    scale = slide.level_downsamples[level]
    size = (max(1, round(across * side / scale)), max(1, round(side / scale)))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError("no coarse level")
    for y in range(0, height - side + 1, side):
        strip = slide.read_region((0, y), level, size)
        cells = np.asarray(over_white(strip).resize((across * _CELLS, _CELLS), Image.Resampling.BOX))
        share = tissue(cells).reshape(_CELLS, across, _CELLS).mean(axis=(0, 2))
        yield from ((int(column) * side, y) for column in np.flatnonzero(share >= min_tissue))


def tissue(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the mask of stained tissue in uint8 (..., 3): colored and not black."""
    high = pixels.max(axis=-1).astype(np.int32)
    low = pixels.min(axis=-1).astype(np.int32)
    # HSV saturation without the division: (high - low) / high >= threshold / 255.
    return np.logical_and((high - low) * 255 >= _MIN_SATURATION * high, high >= _MIN_BRIGHTNESS)
