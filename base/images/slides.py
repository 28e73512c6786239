"""One square of a whole-slide image, brought to a teacher's scale. Needs openslide."""

import functools
from dataclasses import dataclass

import openslide
from PIL import Image

from mmkd.base.images.pixels import over_white, ppm
from mmkd.base.images.source import MAX_PIXELS, ImageError, ImageSource, check_pixels
from mmkd.base.places.reading import stat_file


@dataclass(frozen=True)
class SlideTile(ImageSource):
    """A square at level-0 pixel `corner`, `side` pixels wide, brought to `out` pixels as PPM, from the coarsest level
    that is still finer. Transparent pixels (outside the scanned area) become white, as the glass around them."""

    corner: tuple[int, int]
    side: int
    out: int

    def _encoded(self) -> bytes:
        if not self.place.is_file():
            raise ImageError("file not found")
        if not 0 < self.out <= self.side or self.out**2 > MAX_PIXELS:
            raise ImageError("slide: a tile of this size cannot be read")
        try:
            slide = open_slide(str(self.place), stat_file(self.place).stamp)
            level = slide.get_best_level_for_downsample(self.side / self.out)
            edge = max(1, round(self.side / slide.level_downsamples[level]))
            check_pixels(edge**2)
            region = slide.read_region(self.corner, level, (edge, edge))
        except (openslide.OpenSlideError, OSError, ValueError):
            # After one failed read openslide refuses all others of that handle.
            open_slide.cache_clear()
            raise ImageError("slide: damaged or not a slide") from None
        flat = over_white(region)
        if edge != self.out:
            resampling = Image.Resampling.BOX if edge > self.out else Image.Resampling.BICUBIC
            flat = flat.resize((self.out, self.out), resampling)
        return ppm(flat)


# A handle keeps a cache of tiles; openslide reads from several threads at once.
@functools.lru_cache(maxsize=4)
def open_slide(path: str, stamp: str) -> openslide.OpenSlide:
    """Return an open slide; `stamp` distinguishes a file from its replacement. Raises OpenSlideError."""
    return openslide.OpenSlide(path)
