"""Several captions, or several images, of one sample: `first` (one row) or `each` (one row for every one).

Further rows of `each` have keys `KEY#1`, `KEY#2`, ...; an image that they share is decoded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from mmkd.extract.corpora.row import CAPTION_FAULT, CorpusRow, as_label, is_blank

Choice = Literal["first", "each"]


def caption_list(value: object) -> list[str]:
    """The captions in a value of JSON or Parquet: a text, a number, or a list of these; blank ones are left out.

    Raises:
        TypeError: there is a mapping, which is no text.
    """
    texts = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict | list):
            raise TypeError(type(item).__name__)
        text = (as_label(item) or "").strip().strip("\ufeff")
        if not is_blank(text):
            texts.append(text)
    return texts


def caption_rows(row: CorpusRow, value: object, rule: Choice) -> Iterator[CorpusRow]:
    """The row with each caption that the rule takes; once with an empty caption where there is none."""
    try:
        captions = caption_list(value)
    except TypeError:
        row, captions = dataclasses.replace(row, fault=row.fault or f"{CAPTION_FAULT}a mapping, expected text"), []
    for number, caption in enumerate((captions if rule == "each" else captions[:1]) or [""]):
        yield dataclasses.replace(row, key=f"{row.key}#{number}" if number else row.key, caption=caption)
