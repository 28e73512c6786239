"""Several captions of one image: one of two stated rules.

`first`: the first that is not blank, so that one image is one row (the default).
`each`: one row for every caption, sharing the image, which is decoded once; keys of the second
and further rows end in `#1`, `#2`, ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from mmkd.extract.corpora.row import CorpusRow

Captions = Literal["first", "each"]


def caption_list(value: object) -> list[str]:
    """The captions in a text or a list of texts; anything else in the list is left out."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, list):
        return [item.strip() for item in value if isinstance(item, str)]
    return []


def caption_rows(row: CorpusRow, captions: Sequence[str], rule: Captions) -> Iterator[CorpusRow]:
    """The row once for each caption that the rule keeps; once with an empty caption when all are blank."""
    written = [caption for caption in captions if caption] or [""]
    for number, caption in enumerate(written if rule == "each" else written[:1]):
        yield dataclasses.replace(row, key=f"{row.key}#{number}" if number else row.key, caption=caption)
