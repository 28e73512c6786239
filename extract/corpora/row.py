"""What every corpus reader gives: one row per input, and a few facts about the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

UNDECODABLE = "\ufffd"
"""Stands in a caption where its bytes were not UTF-8; extraction fails such a caption by this mark."""


@dataclass(frozen=True)
class CorpusRow:
    """One input as the corpus names it; nothing has been read or decoded yet."""

    key: str
    caption: str | None
    """None when the corpus has no caption for it by design (a prompt-less picture); '' when one should be there."""
    uri: str | None
    """Of the image's file, relative to the corpus root; None for a text without an image."""
    offset: int | None = None
    length: int | None = None
    """Bytes of the image inside the file; None when it is the whole file."""
    modality: str | None = None
    labels: dict[str, str] = field(default_factory=dict)


class Corpus(Protocol):
    """A corpus that can list its inputs in an order that never changes."""

    @property
    def kind(self) -> str:
        """Name of the reader, for the store's record."""

    @property
    def location(self) -> str:
        """What the user named."""

    @property
    def root(self) -> Path:
        """Folder that every row's `uri` is relative to."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the label columns."""

    def digest(self) -> str:
        """Changes when the corpus' index files change; cheap."""

    def rows(self) -> Iterator[CorpusRow]:
        """All inputs, in an order that depends on the corpus alone."""
