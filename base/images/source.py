"""Sources of one image's encoded bytes, size limits that protect workers, and failure reasons."""

from dataclasses import dataclass

from PIL import Image

from mmkd.base.errors import UnreachableError
from mmkd.base.places.reading import read_range
from mmkd.base.places.remote import StorePath

MAX_PIXELS = 1 << 27
"""134 million pixels (11,585 squared): a decompression bomb would take 400 MB and more per decoding thread."""

MAX_BYTES = 1 << 30
"""Maximum encoded bytes of one image; anything larger is not an image."""


class ImageError(Exception):
    """An image cannot be used; the message is the row's reason, without the word `image`."""


def check_pixels(count: int) -> None:
    """Raise ImageError for more than `MAX_PIXELS`."""
    if count > MAX_PIXELS:
        raise ImageError(f"more than {MAX_PIXELS:,} pixels")


def check_bytes(count: int) -> None:
    """Raise ImageError for more than `MAX_BYTES`."""
    if count > MAX_BYTES:
        raise ImageError(f"larger than {MAX_BYTES >> 20} MB")


def unreadable(error: Exception) -> ImageError:
    """Return one reason for equal faults, so that they can be counted: the path is in the row already."""
    if isinstance(error, FileNotFoundError):
        return ImageError("file not found")
    if isinstance(error, UnreachableError):
        return ImageError("the service did not answer with it")
    if isinstance(error, OSError) and error.strerror:
        return ImageError(str(error.strerror))
    return ImageError("cannot be read")


@dataclass(frozen=True)
class ImageSource:
    """Source of one image's encoded bytes. Equal sources give equal bytes; all are hashable."""

    place: StorePath
    """The file that holds it."""

    def read(self) -> bytes:
        """Return bytes for `decode`. Raises ImageError if they are missing, empty, damaged, cut off, or too large."""
        try:
            return self._encoded()
        except (OSError, UnreachableError, ValueError) as error:
            raise unreadable(error) from error

    @property
    def origin(self) -> "ImageSource":
        """The source whose bytes these are: of pictures that are made of one image, that of the image."""
        return self

    def picture(self, image: Image.Image) -> Image.Image:
        """Return the picture that is meant, of the decoded image."""
        return image

    def _encoded(self) -> bytes:
        raise NotImplementedError


@dataclass(frozen=True)
class FileImage(ImageSource):
    """A file, or a slice of one."""

    offset: int | None = None
    length: int | None = None

    def _encoded(self) -> bytes:
        check_bytes(self.length or 0)
        data = read_range(self.place, self.offset or 0, self.length if self.length is not None else MAX_BYTES + 1)
        # A member that should be there and is not was cut off with its archive.
        if len(data) < (self.length or 0):
            raise ImageError("archive ends inside this member")
        if not data:
            raise ImageError("empty file")
        check_bytes(len(data))
        return data
