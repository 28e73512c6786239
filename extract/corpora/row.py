"""What every corpus reader gives: one row per input, and a few facts about the whole."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

UNDECODABLE = "\ufffd"
"""Stands in a caption where its bytes were not UTF-8; extraction fails such a caption by this mark."""

MAX_CAPTION = 1 << 20
"""Characters. A caption is a paragraph; what is longer is a parsing accident or an attack on memory."""
MAX_LABEL = 1 << 16
"""Characters of one label value; longer ones are cut."""
MAX_KEY = 1 << 12
"""Characters of a key: longer than any path."""

_SURROGATES = re.compile("[\ud800-\udfff]")

INDEX_FAULTS = ("key: ", "archive: ", "row: ")
"""How the reasons begin that are known before anything is read: such rows are failed, never looked at again."""
CAPTION_FAULT = "caption: "
IMAGE_FAULT = "image: "


@dataclass(frozen=True)
class CorpusRow:
    """One input as the corpus names it; nothing has been read or decoded yet."""

    key: str
    caption: str | None
    """None when the corpus has no caption for it by design (a prompt-less picture); '' when one should be there."""
    uri: str | None
    """Of the image's file, relative to the corpus root; None for a text without an image. See `store.sources`."""
    offset: int | None = None
    length: int | None = None
    """Bytes of the image inside the file; None when it is the whole file."""
    modality: str | None = None
    labels: dict[str, str | None] = field(default_factory=dict)
    fault: str | None = None
    """What is already known to be wrong: an `INDEX_FAULTS` reason fails the row, a `CAPTION_FAULT` one its caption."""


@dataclass(frozen=True)
class Part:
    """A piece of a corpus that can be listed by itself: a tar, a Parquet file, a folder of images, a table."""

    name: str
    size: int
    """Bytes."""
    stamp: str
    """Changes when the part does: change time, the service's tag, or a hash."""


class Corpus(Protocol):
    """A corpus that can list its inputs in an order that never changes."""

    @property
    def kind(self) -> str:
        """Name of the reader, for the store's record."""

    @property
    def location(self) -> str:
        """What the user named."""

    @property
    def root(self) -> str:
        """Absolute folder, or URL prefix, that every row's `uri` is relative to."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the label columns."""

    def settings(self) -> str:
        """How the corpus is read, as text; paths are not in it, so that a corpus may move."""

    def parts(self) -> Sequence[Part]:
        """The pieces, in the order of their rows; cheap."""

    def rows_of(self, part: Part) -> Iterator[CorpusRow]:
        """A part's inputs, in an order that depends on the part alone. Parts are listed in parallel."""


def corpus_rows(corpus: Corpus) -> Iterator[CorpusRow]:
    """All inputs in order."""
    for part in corpus.parts():
        yield from corpus.rows_of(part)


def corpus_digest(corpus: Corpus, parts: Sequence[Part]) -> str:
    """SHA-256 over the parts' names, sizes and stamps and how they are read: changes when the corpus does."""
    facts = [(part.name, part.size, part.stamp) for part in parts]
    return hashlib.sha256(json.dumps([corpus.kind, corpus.settings(), facts]).encode()).hexdigest()


def as_label(value: object) -> str | None:
    """Any value as a label. Blank text is null; other text stays; truth is `true` or `false`; all else is JSON.

    JSON prints a number in its shortest form, so one value has one text whatever the format it came from.
    """
    if value is None or isinstance(value, str):
        return value if value is not None and value.strip() else None
    return json.dumps(value, ensure_ascii=False, default=str)


def first_text(value: object) -> str | None:
    """A text, or the first of a list of texts: released corpora give modalities either way."""
    if isinstance(value, list):
        value = next((item for item in value if isinstance(item, str) and item), None)
    return value if isinstance(value, str) and value else None


def decodable(text: str) -> str:
    """Text that is UTF-8: lone surrogates (undecodable bytes, or JSON that escaped half a character) are marked."""
    return text if text.isascii() else _SURROGATES.sub(UNDECODABLE, text)
