"""Overview of a listed corpus: contents and faults of its rows, and ignored files, with examples."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from mmkd.base.text import counted
from mmkd.extract.corpora import Ignored
from mmkd.extract.corpora.row import NO_CAPTION, NO_IMAGE

_COMPLETE = (
    "complete the pairs, name members such as left.jpg in `image_members` or `caption_members`, or extract with "
    "--require pairs, images or texts"
)
# What to do about a reason, by its beginning.
_ADVICE = {
    "key: duplicate": "name a key column; set `shard_keys: true` where files number their rows alike; put an image and "
    "its caption into one tar",
    "key: neither": "fill in the image or the caption, or drop the line",
    "key: longer": "name a column of shorter keys",
    "archive: ": "copy or download the file again",
    "row: more cells": "quote cells that hold the delimiter, or set `delimiter` or `quotes: false`",
    "row: fewer cells": "complete the line, or set `delimiter`",
    "row: a quotation mark": "close it, or set `quotes: false`",
    "row: image path": "rename the file",
    "row: slide: does not": "set `slide_mpp`",
    "caption: not UTF-8": "set `encoding`, or save the text as UTF-8",
    "caption: sidecar has no": "set `caption_field`",
    "caption: empty": "write a caption, or extract with --require images",
    "caption: a further": "set `captions: each`",
    "caption: sidecar larger": "set `caption_members`",
    NO_IMAGE: _COMPLETE,
    NO_CAPTION: _COMPLETE,
    "image: file not found": "set `images` to the folder of the paths, or fetch what links point to",
    "image: path leaves": "set `images`, or download what is behind a URL",
    "image: no row names it": "add a line for it to the table, or leave it",
    "image: a further": "set `pictures: each`",
    "row: not a JSON": "write one object per line",
    "row: a field stands": "name each field once",
    "row: after the first": "extract without --limit",
    "file: after the first": "extract without --limit",
    "file: in none": "name it in `splits`",
    "file: not among": "name it in `only`",
    "file: has no rows": "check that it is whole",
    "image: not an image": "convert the file, or drop the line",
    "file: ": "name its kind in a corpus.yaml, or convert it",
    "member: .": "rename it, or name it in `image_members`, `caption_members` or `label_members`",
    "member: not among": "add it there if it is meant",
    "member: a further": "choose by `image_members` or `caption_members`",
    "member: a link": "write the file itself into the tar: tar --dereference --hard-dereference",
    "field: of a JSON": "name what is wanted there",
    "question: ": "name another `language`, or null for all",
    "column: holds bytes": "name it in `columns` if it is the image",
}
_ROW = re.compile(r"of row \d+")


def reason_kind(reason: str) -> str:
    """Return a reason without what differs between equal causes, so that they can be counted."""
    return _ROW.sub("of an earlier row", reason)


def advice(reason: str) -> str:
    """Return the advice for a reason in parentheses, or ''."""
    found = next((text for beginning, text in _ADVICE.items() if reason.startswith(beginning)), None)
    return f" ({found})" if found else ""


@dataclass
class Overview:
    """Counts of a corpus as the index lists it."""

    rows: int = 0
    images: int = 0
    """Rows with an image; of a shared image, each row."""
    captions: int = 0
    pairs: int = 0
    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Rows with a fault known before anything is read: number and first key, by reason."""
    ignored: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Inputs without a row: number and first name, by reason."""

    def add_row(self, key: str, image: bool, caption: bool, reason: str | None) -> None:
        """Count one row."""
        self.rows += 1
        self.images += image
        self.captions += caption
        self.pairs += image and caption
        if reason is not None:
            kind = reason_kind(reason)
            count, example = self.reasons.get(kind, (0, key))
            self.reasons[kind] = count + 1, example

    def ignore(self, one: Ignored) -> None:
        """Count an input without a row."""
        count, example = self.ignored.get(one.reason, (0, one.example))
        self.ignored[one.reason] = count + one.count, example

    def as_json(self) -> dict[str, Any]:
        """For `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Overview:
        """Read the output of `as_json`. Raises TypeError if it is something else."""
        tables = {
            name: {reason: tuple(pair) for reason, pair in content[name].items()} for name in ("reasons", "ignored")
        }
        return cls(**content | tables)

    def lines(self) -> Iterator[str]:
        """Yield the overview as a user reads it, at most ten lines for each of faults and ignored inputs."""
        one_sided = self.images + self.captions - 2 * self.pairs
        sides = f", {counted(one_sided, 'row')} with one side" if one_sided and self.images and self.captions else ""
        yield (
            f"corpus: {counted(self.images, 'image')}, {counted(self.captions, 'caption')}, "
            f"{counted(self.pairs, 'pair')}{sides}"
        )
        for what, found in (("", self.reasons), ("ignored: ", self.ignored)):
            counts = Counter({reason: count for reason, (count, _) in found.items()})
            for reason, count in counts.most_common(10):
                example = found[reason][1]
                yield f"  {what}{count:,} x {reason}, such as {_short(example)}{advice(reason)}"
            if len(counts) > 10:
                yield f"  {what}{len(counts) - 10} further reasons"


def _short(text: str) -> str:
    shown = text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"
    return shown if shown.isprintable() else repr(shown)
