"""Sources of one image's encoded bytes, size limits that protect workers, and failure reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mmkd.base.errors import UnreachableError
from mmkd.base.places.reading import read_range
from mmkd.base.places.remote import StorePath

MAX_PIXELS = 1 << 27
"""134 million pixels (11,585 squared): a decompression bomb would take 400 MB and more per decoding thread."""

MAX_BYTES = 1 << 30
"""Maximum encoded bytes of one image; anything larger is not an image."""


class ImageError(Exception):
    """An image cannot be used; the message is the row's reason, without the word `image`."""


class ImageSource(Protocol):
    """Source of one image's encoded bytes. Equal sources give equal bytes; all are hashable."""

    @property
    def path(self) -> str:
        """The file, for messages to the corpus' owner."""

    def read(self) -> bytes:
        """Return what `images.decode` understands. Raises ImageError if it is missing, empty, cut off, or too large."""


@dataclass(frozen=True)
class FileImage:
    """A file, or a slice of one."""

    place: StorePath
    offset: int | None = None
    length: int | None = None

    @property
    def path(self) -> str:
        """The file."""
        return str(self.place)

    def read(self) -> bytes:
        """Return the encoded bytes. Raises ImageError if it is missing, empty, cut off, or too large."""
        if self.length is not None and self.length > MAX_BYTES:
            raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
        try:
            data = read_range(self.place, self.offset or 0, self.length if self.length is not None else MAX_BYTES + 1)
        except (OSError, UnreachableError, ValueError) as error:
            raise unreadable(error) from error
        if not data:
            # A member that should be there and is not was cut off with its archive.
            raise ImageError("archive ends inside this member" if self.length else "empty file")
        if self.length is not None and len(data) < self.length:
            raise ImageError("archive ends inside this member")
        if len(data) > MAX_BYTES:
            raise ImageError(f"larger than {MAX_BYTES >> 20} MB")
        return data


def unreadable(error: Exception) -> ImageError:
    """Return one reason for equal faults, so that they can be counted: the path is in the row already."""
    if isinstance(error, FileNotFoundError):
        return ImageError("file not found")
    if isinstance(error, UnreachableError):
        return ImageError("the service did not answer with it")
    if isinstance(error, OSError) and error.strerror:
        return ImageError(str(error.strerror))
    return ImageError("cannot be read")
