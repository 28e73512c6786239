"""Captions as tokens, without padding until a batch needs it."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

Tokenize = Callable[[list[str]], torch.Tensor]
"""Captions to int64 (n, L)."""

_TOKENIZED_TOGETHER = 4096
_SPREAD_OVER = 65_536
# Matrix products like multiples of eight, and a handful of shapes is all that torch.compile has to see.
_LENGTH_STEP = 8


@dataclass(frozen=True)
class Captions:
    """Captions as tokens. values: int32 (sum of lengths,), one caption after another. starts: int64 (u + 1,), where
    each begins. pad: the token that fills a row. context: L, the longest that the student reads."""

    values: NDArray[np.int32]
    starts: NDArray[np.int64]
    pad: int
    context: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self, captions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the tokens of each of these captions that are not padding."""
        return self.starts[captions + 1] - self.starts[captions]

    def columns(self, captions: NDArray[np.int64]) -> tuple[int, ...]:
        """Count the columns that each of these captions needs: a multiple of eight, or the context."""
        needed = -(-self.lengths(captions) // _LENGTH_STEP) * _LENGTH_STEP
        return tuple(np.minimum(needed, self.context).tolist())

    def spread(self, count: int) -> NDArray[np.int64]:
        """Return numbers of at most `count` captions of all lengths that need less than the context, shortest first."""
        looked_at = evenly(len(self), _SPREAD_OVER)
        order = looked_at[self.lengths(looked_at).argsort(kind="stable")]
        needed = -(-self.lengths(order) // _LENGTH_STEP) * _LENGTH_STEP
        short = order[(needed > 0) & (needed < self.context)]
        return short[evenly(len(short), count)]

    def tokens(self, captions: NDArray[np.int64]) -> torch.Tensor:
        """Return int64 (B, L): the captions of these numbers, padded to the context."""
        rows = np.full((len(captions), self.context), self.pad, dtype=np.int64)
        for row, caption in zip(rows, captions.tolist(), strict=True):
            tokens = self.values[self.starts[caption] : self.starts[caption + 1]]
            row[: len(tokens)] = tokens
        return torch.from_numpy(rows)

    def numbers(self) -> NDArray[np.int64]:
        """Return a number for each caption, int64 (u,), equal for captions of equal tokens (also where both were
        cut)."""
        ends = self.starts.tolist()
        return numbers_of(self.values[a:b].tobytes() for a, b in pairwise(ends))

    def take(self, captions: NDArray[np.int64]) -> "Captions":
        """Return these captions alone."""
        lengths = self.lengths(captions)
        starts = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        within = np.arange(starts[-1]) + np.repeat(self.starts[captions] - starts[:-1], lengths)
        return Captions(self.values[within], starts, self.pad, self.context)


def numbers_of(values: Iterable[bytes]) -> NDArray[np.int64]:
    """Return 63 bits of the BLAKE2b of each value: equal numbers for equal values, whatever else there is. Of a hundred
    million different ones two are expected to agree in one of 2,000 runs."""
    digests = b"".join(hashlib.blake2b(value, digest_size=8).digest() for value in values)
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(1)).astype(np.int64)


def tokenize_captions(captions: Sequence[str], tokenizer: Tokenize) -> Captions:
    """Tokenize captions, a few thousand at a time."""
    empty = tokenizer([""])[0]
    pad, context = int(empty[-1]), len(empty)
    values, lengths = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(captions), _TOKENIZED_TOGETHER):
        tokens = tokenizer(list(captions[first : first + _TOKENIZED_TOGETHER])).numpy()
        # Up to the last token that is not padding: a tokenizer may use its padding token inside.
        used = context - (tokens[:, ::-1] != pad).argmax(axis=1)
        used[(tokens == pad).all(axis=1)] = 1
        values.append(tokens[np.arange(context) < used[:, None]].astype(np.int32))
        lengths.append(used.astype(np.int64))
    return Captions(np.concatenate(values), np.concatenate(lengths).cumsum(), pad, context)


def evenly(count: int, wanted: int) -> NDArray[np.int64]:
    """Return at most `wanted` of `count` numbers, spread evenly."""
    return np.unique(np.linspace(0, count - 1, wanted).astype(np.int64)) if count else np.empty(0, np.int64)
