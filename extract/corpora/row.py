"""Rows of a corpus, ignored files, and the protocol of its readers."""

import codecs
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

MAX_CAPTION = 1 << 20
"""Characters. A caption is a paragraph; anything longer is a parsing accident or an attack on memory."""
MAX_LABEL = 1 << 16
"""Characters of one label value; longer ones are cut."""
MAX_KEY = 1 << 12
"""Characters of a key: longer than any path."""

_SURROGATES = re.compile("[\ud800-\udfff]")
# White space, controls, zero-width and direction marks, byte order mark: nothing that a reader sees.
_INVISIBLE = re.compile(
    r"[\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]*"
)

INDEX_FAULTS = ("key: ", "archive: ", "row: ")
"""Beginnings of reasons that fail a row before anything is read."""
CAPTION_FAULT = "caption: "
IMAGE_FAULT = "image: "
NO_IMAGE, NO_CAPTION = "pair: no image", "pair: no caption"
"""One side is missing in a corpus of pairs: the row is `partial`, its other side is used."""
ONE_SIDED = (NO_IMAGE, NO_CAPTION)


@dataclass(frozen=True)
class CorpusRow:
    """One input as the corpus names it, before anything is read or decoded."""

    key: str
    caption: str | None
    """None when the corpus has no caption for it by design; '' when one should be there."""
    uri: str | None
    """Image path relative to the corpus root; None for a text without an image. See `base.images.uri`."""
    offset: int | None = None
    length: int | None = None
    """Bytes of the image inside the file; None when it is the whole file."""
    modality: str | None = None
    labels: dict[str, str | None] = field(default_factory=dict)
    fault: str | None = None
    """Known fault: an `INDEX_FAULTS` reason fails the row, a `CAPTION_FAULT` one its caption, a `ONE_SIDED` one says
    which side is missing."""
    by_design: bool = False
    """True where one side is all there is: a prompt, or an answer to a question."""
    image_rows: tuple[int, ...] | None = None
    """Of a picture that is made of an image: the grid row of the image."""
    view_number: int | None = None
    further: tuple[tuple[str, str | None], ...] = ()
    """Captions beside the first, each with its kind: `synthetic`, `reference`, ..."""
    joins: bool = False
    """True where a row of a key and an image that an earlier row has is a further caption of that row."""
    caption_kind: str | None = None
    """Kind of what becomes a further caption of the row."""
    if_taken: str | None = None
    """Appended to the key, after `#`, where an earlier row has it and this one is kept all the same."""


@dataclass(frozen=True)
class Ignored:
    """An input that makes no row: a file, member, column or folder that the reader does not use."""

    reason: str
    """Equal for equal causes, so that they can be counted: `member: .npy is not read`."""
    example: str
    count: int = 1


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
        """Path the user gave."""

    @property
    def root(self) -> str:
        """Absolute folder, or URL prefix, that every row's `uri` is relative to."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the label columns."""

    def settings(self) -> str:
        """Reading settings as text, without paths so that a corpus may move."""

    def parts(self) -> Sequence[Part]:
        """Return the pieces, in the order of their rows; cheap."""

    def rows_of(self, part: Part) -> Iterator[CorpusRow | Ignored]:
        """Yield a part's inputs, in an order that depends on the part alone. Parts are listed in parallel."""

    def ignored(self) -> Iterator[Ignored]:
        """Yield files, folders and columns that no part uses."""


@dataclass(frozen=True)
class DerivedCorpus:
    """A corpus made of another one; what a subclass does not define is the other's."""

    corpus: Corpus

    @property
    def kind(self) -> str:
        return self.corpus.kind

    @property
    def location(self) -> str:
        return self.corpus.location

    @property
    def root(self) -> str:
        return self.corpus.root

    @property
    def labels(self) -> tuple[str, ...]:
        return self.corpus.labels

    def ignored(self) -> Iterator[Ignored]:
        return self.corpus.ignored()


def corpus_rows(corpus: Corpus) -> Iterator[CorpusRow]:
    for part in corpus.parts():
        yield from (row for row in corpus.rows_of(part) if isinstance(row, CorpusRow))


def corpus_digest(corpus: Corpus, parts: Sequence[Part]) -> str:
    """Return the SHA-256 over the parts' names, sizes and stamps and how they are read."""
    facts = [(part.name, part.size, part.stamp) for part in parts]
    return hashlib.sha256(json.dumps([corpus.kind, corpus.settings(), facts]).encode()).hexdigest()


def as_label(value: object) -> str | None:
    """Return any value as a label. Blank text and NaN are null, other text stays, bytes are decoded; truth, numbers in
    their shortest form and lists are JSON, all else is as Python prints it: one value has one text in every format."""
    if isinstance(value, bytes):
        value = decode_text(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    is_json = isinstance(value, bool | int | float | list | tuple | dict)
    return json.dumps(value, ensure_ascii=False, default=str) if is_json else str(value)


Choice = Literal["first", "each"]
"""Handling of several images of one input: one row with the first, or a row for each. Further rows have keys `KEY#1`,
`KEY#2`, ...; an image that they share is decoded once."""
Captions = Literal["first", "each", "further"]
"""Handling of several captions of one input: as `Choice`, or one row with the first, and each further distinct caption
of the corpus once, in rows for texts alone behind the others."""


def caption_rows(row: CorpusRow, value: object, rule: Captions) -> Iterator[CorpusRow | Ignored]:
    """Yield the row with each caption that the rule takes of `value`, a text, a number, or a list of these as JSON and
    Parquet hold them; blank ones do not count. Without any, the row has an empty caption."""
    items = value if isinstance(value, list) else [value]
    if (nested := next((item for item in items if isinstance(item, dict | list | tuple)), None)) is not None:
        found = f"{CAPTION_FAULT}{'a mapping' if isinstance(nested, dict) else 'a list in a list'}, expected text"
        yield replace(row, caption="", fault=found if row.fault in (None, *ONE_SIDED) else row.fault)
        return
    texts = ((as_label(item) or "").strip().strip("\ufeff") for item in items)
    captions = [text for text in texts if not is_blank(text)] or [""]
    if rule == "first" and len(captions) > 1:
        yield Ignored("caption: a further one of its row", row.key, len(captions) - 1)
        del captions[1:]
    if rule == "further":
        more = tuple((text, row.caption_kind) for text in captions[1:])
        captions, row = captions[:1], replace(row, further=(*more, *row.further), joins=True)
    for number, caption in enumerate(captions):
        yield replace(row, key=f"{row.key}#{number}" if number else row.key, caption=caption)


def further_captions(
    values: Mapping[str, object], kinds: Mapping[str, str], key: str
) -> tuple[tuple[tuple[str, str | None], ...], list[Ignored]]:
    """Return the captions of further columns or fields, a text or a list of texts each, with their kinds, and what is
    ignored: mappings and lists in lists of the row `key`. Blank ones do not count."""
    found, nested = list[tuple[str, str | None]](), 0
    for name, kind in kinds.items():
        value = values.get(name)
        for item in value if isinstance(value, list) else [value]:
            text = "" if isinstance(item, dict | list | tuple) else (as_label(item) or "").strip().strip("\ufeff")
            nested += isinstance(item, dict | list | tuple)
            found += [] if is_blank(text) else [(text, kind)]
    return tuple(found), [Ignored("caption: no text in a further column", key, nested)] if nested else []


def first_text(value: object) -> str | None:
    """Return a text, or the first of a list of texts: released corpora give modalities either way."""
    items = value if isinstance(value, list) else [value]
    return next((item for item in items if isinstance(item, str) and item), None)


def replace_surrogates(text: str) -> str:
    """Return text with U+FFFD for lone surrogates: undecodable bytes, or half a character escaped in JSON."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def is_blank(text: str) -> bool:
    """Return True when a reader would see nothing: white space, zero-width characters, a byte order mark."""
    return _INVISIBLE.fullmatch(text) is not None


def decode_text(data: bytes) -> str:
    """Return text of a sidecar, UTF-8 or by its byte order mark; undecodable bytes become lone surrogates."""
    mark, encoding = next(((mark, name) for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), (b"", "utf-8"))
    return data[len(mark) :].decode(encoding, UNDECODABLE_BYTES)


UNDECODABLE_BYTES = "mmkd-surrogates"
"""Error handler of any codec: a lone surrogate where bytes cannot be decoded, which `replace_surrogates` marks."""
codecs.register_error(UNDECODABLE_BYTES, lambda error: ("\udcff", error.end))  # type: ignore[attr-defined]
# UTF-32's little-endian mark begins with that of UTF-16.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    *((codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be")),
    *((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")),
)
