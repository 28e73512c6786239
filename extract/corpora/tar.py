"""Members of a tar, which is never unpacked: their places, and what a damaged archive still holds."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from mmkd.base.errors import CorpusError
from mmkd.extract.corpora.row import Ignored

# Headers are 512 bytes, and extended ones carry long names. Without a bound, one that claims to be as long as its
# archive is read into memory whole.
_MAX_HEADER = 1 << 20


@dataclass(frozen=True)
class Member:
    """One ordinary file inside the archive. Its name is text: nothing is ever opened by it."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """Damaged place in an archive."""

    offset: int


class _Bounded:
    """A file that refuses large reads; tarfile needs read, seek and tell."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """As a file's.

        Raises:
            tarfile.ReadError: more than a header was asked for.
        """
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError("header too large")
        return self.file.read(size)


def tar_members(file: IO[bytes], name: str) -> Iterator[Member | Ignored | Damage]:
    """Yield members in the order of the archive; a `Damage` last when it does not end as a tar should. Folders are left
    out; links, devices and sparse files are ignored. Raises CorpusError if it is not an uncompressed tar."""
    try:
        archive = tarfile.open(fileobj=_Bounded(file), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
    except (tarfile.ReadError, EOFError) as error:
        raise CorpusError(
            f"{name} is not an uncompressed tar ({error}); mmkd reads images in place: gunzip compressed tars first"
        ) from error
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, ValueError, OverflowError):
            yield Damage(archive.offset)
            return
        if member is None:
            break
        archive.members.clear()  # else every header stays in memory
        if member.isreg() and not member.issparse():
            yield Member(member.name, member.offset_data, member.size)
        elif not member.isdir():
            yield Ignored("member: a link, a device or a sparse file", member.name)
    # tarfile takes a header that is cut off or overwritten for the end. A sound archive ends in a block of zeros.
    file.seek(archive.offset)
    end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        yield Damage(archive.offset)
