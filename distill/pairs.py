"""Selected rows of a store with image sources and captions, and these as tokens: each distinct caption tokenized once,
kept without padding, padded when a batch needs it. As millions take minutes to tokenize and seconds to read,
`OUT/tokens.npz` keeps them with a digest of the captions. It is no part of a run's state: a file that is missing,
damaged, of other captions or of another tokenizer is written again."""

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from mmkd.base.conditions import parse_condition
from mmkd.base.errors import IncompleteStoreError, UserError
from mmkd.base.files import write_atomically
from mmkd.store import FeatureStore

Tokenize = Callable[[list[str]], torch.Tensor]
"""Captions to int64 (n, L)."""

FILE = "tokens.npz"
WORTH_KEEPING = 100_000
"""Fewer captions are tokenized in seconds."""
PROBED = 256
"""Captions, spread evenly, that are tokenized again to see that the tokenizer is the same."""
_HASHED_TOGETHER, _TOKENIZED_TOGETHER = 65_536, 4096
# Matrix products like multiples of eight, and a handful of shapes is all that torch.compile has to see.
_LENGTH_STEP = 8

_COLUMNS = ["row", "caption", "uri", "offset", "length", "status", "image_sha256"]
_UNPAIRED_COLUMNS = ["reason", "width", "image_rows"]


@dataclass(frozen=True)
class Pairs:
    """Rows with a sound image and a sound caption, or with one of them alone. rows: int64 (n,) grid rows, ascending.
    caption: int64 (n,), number of each row's caption: equal captions have equal numbers. image: int64 (n,), number of
    each row's image, equal for equal bytes. Both are -1 where there is none. captions: the distinct captions by number.
    table: the sample rows, in the order of `rows`."""

    rows: NDArray[np.int64]
    caption: NDArray[np.int64]
    image: NDArray[np.int64]
    captions: pa.LargeStringArray
    table: pa.Table

    def places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index in `rows` of each of these grid rows."""
        return np.searchsorted(self.rows, rows)

    @property
    def counts(self) -> dict[str, int]:
        """Count pairs, images alone and texts alone, the latter two only where there are any."""
        images, texts = int((self.caption < 0).sum()), int((self.image < 0).sum())
        counts = {"pair": len(self.rows) - images - texts, "lone image": images, "lone text": texts}
        return {name: count for name, count in counts.items() if count or name == "pair"}

    @cached_property
    def all_paired(self) -> bool:
        """True if no row has an image or a caption alone."""
        return len(self.counts) == 1


def rows_where(store: FeatureStore, where: str, columns: list[str]) -> pa.Table:
    """Return sample rows that match a condition as after SQL's WHERE; all rows when it is empty. Raises ConfigError if
    it cannot be read, or names a column that the store does not have."""
    condition = parse_condition(where, store.samples.schema) if where else None
    return store.sample_table(columns=columns, filter=condition)


def find_pairs(
    store: FeatureStore, where: str, wanted: NDArray[np.bool_] | None = None, *, unpaired: bool = False
) -> Pairs:
    """Return the sound pairs among the rows that match `where` (see `rows_where`) and are `wanted`, bool (N,), None for
    all; with `unpaired` also rows with a sound image or a sound caption alone, but for views and further captions.
    Raises IncompleteStoreError if rows that match have not been extracted yet."""
    table = rows_where(store, where, [*_COLUMNS, *(_UNPAIRED_COLUMNS if unpaired else [])])
    pending = int(pc.sum(pc.equal(table["status"], "pending")).as_py() or 0)
    if pending:
        raise IncompleteStoreError(
            f"{store.root}: {pending} of {len(table)} matching rows are not extracted yet; finish `mmkd extract` first"
        )
    image, text = table["uri"].is_valid(), table["caption"].is_valid()
    usable = pc.and_(pc.equal(table["status"], "ok"), pc.and_(image, text))
    if unpaired:
        image, text = _sound_parts(table)
        usable = pc.or_(image, text)
    if wanted is not None:
        usable = pc.and_(usable, pa.array(wanted[table["row"].to_numpy()]))
    table, image = table.filter(usable), image.filter(usable)
    if unpaired:
        table = table.set_column(1, "caption", pc.if_else(text.filter(usable), table["caption"], None))
    # An Arrow string column ends at 2 GB in one piece: four million captions of usual length.
    encoded = table["caption"].cast(pa.large_string()).combine_chunks().dictionary_encode()
    hashes = table["image_sha256"].combine_chunks().dictionary_encode()
    number = hashes.indices.fill_null(-1).to_numpy().astype(np.int64)
    number = np.where(number < 0, len(number) + np.arange(len(number)), number)  # a row without a hash is alone
    pairs = Pairs(
        table["row"].to_numpy(),
        encoded.indices.fill_null(-1).to_numpy().astype(np.int64),
        np.where(image.to_numpy(), number, -1),
        encoded.dictionary,
        table.select(["uri", "offset", "length"]).combine_chunks(),
    )
    # Arrow's pool keeps what reading and filtering took: 1.4 of 2.0 GB of 2.9 million pairs, as long as the run lasts.
    del table, encoded, hashes, usable, image, text
    pa.default_memory_pool().release_unused()
    return pairs


def _sound_parts(table: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Return where rows have a sound image, and where a sound caption; views and further captions have neither."""
    ok, partial = (pc.and_(table["image_rows"].is_null(), pc.equal(table["status"], s)) for s in ("ok", "partial"))
    wrong = pc.match_substring_regex(table["reason"], "(^|; )caption: ").fill_null(False)
    image = pc.or_(ok, pc.and_(partial, table["width"].is_valid()))
    text = pc.or_(ok, pc.and_(partial, pc.invert(wrong)))
    return pc.and_(image, table["uri"].is_valid()), pc.and_(text, pc.not_equal(table["caption"].fill_null(""), ""))


def training_pairs(
    store: FeatureStore, where: str, wanted: NDArray[np.bool_] | None, batch_size: int, *, unpaired: bool = False
) -> Pairs:
    """Return the pairs to train on. Raises UserError if they are fewer than a batch; otherwise as `find_pairs`."""
    pairs = find_pairs(store, where, wanted, unpaired=unpaired)
    if len(pairs.rows) < batch_size:
        having = "" if wanted is None else " and have a teacher"
        raise UserError(
            f"{store.root}: {len(pairs.rows)} rows match {where or 'everything'}{having}, "
            f"fewer than one batch of {batch_size}; lower batch_size or change `where`"
        )
    return pairs


@dataclass(frozen=True)
class Captions:
    """Distinct captions as tokens. values: int32 (sum of lengths,), one caption after another. starts: int64 (u + 1,),
    where each begins. pad: the token that fills a row. context: L, the longest that the student reads."""

    values: NDArray[np.int32]
    starts: NDArray[np.int64]
    pad: int
    context: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (u,), tokens of each caption that are not padding."""
        return np.diff(self.starts)

    @property
    def distinct(self) -> NDArray[np.int64]:
        """int64 (u,), a number for each caption, equal for captions of equal tokens (also where both were cut)."""
        buffers = [None, pa.py_buffer(self.starts * 4), pa.py_buffer(np.ascontiguousarray(self.values))]
        tokens = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(self.starts) - 1, buffers)
        return tokens.dictionary_encode().indices.to_numpy().astype(np.int64)

    def columns(self, captions: NDArray[np.int64]) -> tuple[int, ...]:
        """Count the columns that each of these captions needs: a multiple of eight, or the context."""
        needed = -(-self.lengths[captions] // _LENGTH_STEP) * _LENGTH_STEP
        return tuple(np.minimum(needed, self.context).tolist())

    def spread(self, count: int) -> NDArray[np.int64]:
        """Return numbers of at most `count` captions of all lengths that need less than the context, shortest first."""
        order = self.lengths.argsort(kind="stable")
        short = order[-(-self.lengths[order] // _LENGTH_STEP) * _LENGTH_STEP < self.context]
        return short[np.unique(np.linspace(0, len(short) - 1, count).astype(np.int64))] if len(short) else short

    def tokens(self, captions: NDArray[np.int64]) -> torch.Tensor:
        """Return int64 (B, L): the captions of these numbers, padded to the context."""
        rows = np.full((len(captions), self.context), self.pad, dtype=np.int64)
        for row, caption in zip(rows, captions.tolist(), strict=True):
            tokens = self.values[self.starts[caption] : self.starts[caption + 1]]
            row[: len(tokens)] = tokens
        return torch.from_numpy(rows)


def tokenize_captions(captions: Sequence[str] | pa.Array, tokenizer: Tokenize) -> Captions:
    """Tokenize distinct captions, a few thousand at a time; strings, or an Arrow array of them."""
    empty = tokenizer([""])[0]
    pad, context = int(empty[-1]), len(empty)
    values, lengths = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(captions), _TOKENIZED_TOGETHER):
        part = captions[first : first + _TOKENIZED_TOGETHER]
        tokens = tokenizer(part.to_pylist() if isinstance(part, pa.Array) else list(part)).numpy()
        # Up to the last token that is not padding: a tokenizer may use its padding token inside.
        used = context - (tokens[:, ::-1] != pad).argmax(axis=1)
        used[(tokens == pad).all(axis=1)] = 1
        values.append(tokens[np.arange(context) < used[:, None]].astype(np.int32))
        lengths.append(used.astype(np.int64))
    return Captions(np.concatenate(values), np.concatenate(lengths).cumsum(), pad, context)


def load_tokens(out: Path, captions: pa.Array, tokenizer: Tokenize) -> Captions:
    """Return distinct captions, an Arrow array of strings, as tokens: those saved in `out` if they are still right."""
    if len(captions) >= WORTH_KEEPING:
        if (found := _read(out / FILE, _digest(captions))) is not None:
            probed = np.unique(np.linspace(0, len(captions) - 1, PROBED).astype(np.int64))
            now = tokenize_captions(captions.take(pa.array(probed)), tokenizer)
            alike = (now.pad, now.context) == (found.pad, found.context)
            if alike and torch.equal(found.tokens(probed), now.tokens(np.arange(len(probed)))):
                return found
        logging.getLogger(__name__).info("tokenizing %d captions; resuming this run will read them", len(captions))
    return tokenize_captions(captions, tokenizer)


def save_tokens(out: Path, captions: pa.Array, made: Captions) -> None:
    """Save the tokens of a new run if they take long to make. Raises StoreError if the disk is full or read-only."""
    path, digest = out / FILE, _digest(captions)
    if len(captions) >= WORTH_KEEPING and _read(path, digest) is None:
        buffer = io.BytesIO()
        numbers = np.array([made.pad, made.context])
        np.savez(buffer, values=made.values, starts=made.starts, numbers=numbers, digest=np.array(digest))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getbuffer())


def _digest(captions: pa.Array) -> str:
    found = hashlib.sha256()
    for first in range(0, len(captions), _HASHED_TOGETHER):
        # Each with its length before it: no two lists of captions give the same bytes.
        texts = [text.encode() for text in captions[first : first + _HASHED_TOGETHER].to_pylist()]
        found.update(b"".join(b"%d:%s" % (len(text), text) for text in texts))
    return found.hexdigest()


def _read(path: Path, digest: str) -> Captions | None:
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["digest"]) != digest:
                return None
            pad, context = kept["numbers"].tolist()
            return Captions(kept["values"], kept["starts"], pad, context)
    # What is cut short or changed: the archive checks its members' CRC.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
