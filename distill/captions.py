"""Captions as tokens: each distinct one tokenised once, kept without padding, padded as far as a batch needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mmkd.distill.student import Tokenise

_TOKENISED_TOGETHER = 4096
# Matrix products like multiples of eight, and a handful of shapes is all that torch.compile has to see.
_LENGTH_STEP = 8


@dataclass(frozen=True)
class Captions:
    """Distinct captions as tokens.

    values: int32 (sum of lengths,), one caption after another. starts: int64 (u + 1,), where each begins.
    pad: the token that fills a row. context: L, the longest that the student reads.
    """

    values: NDArray[np.int32]
    starts: NDArray[np.int64]
    pad: int
    context: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (u,), tokens of each caption that are not padding."""
        return np.diff(self.starts)

    @property
    def short(self) -> NDArray[np.int64]:
        """Numbers of the captions that need fewer columns than the context, the shortest first."""
        order = self.lengths.argsort(kind="stable")
        return order[-(-self.lengths[order] // _LENGTH_STEP) * _LENGTH_STEP < self.context]

    def padded_length(self, captions: NDArray[np.int64], whole: bool) -> int:
        """Columns that these captions need together; the context when `whole`."""
        if whole or not len(captions):
            return self.context
        longest = int(self.lengths[captions].max())
        return min(self.context, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)

    def tokens(self, captions: NDArray[np.int64], length: int) -> torch.Tensor:
        """int64 (B, length) of captions named by number, padded."""
        rows = np.full((len(captions), length), self.pad, dtype=np.int64)
        for row, caption in zip(rows, captions.tolist(), strict=True):
            tokens = self.values[self.starts[caption] : self.starts[caption + 1]]
            row[: len(tokens)] = tokens
        return torch.from_numpy(rows)


def tokenised(captions: Sequence[str] | pa.Array, tokenise: Tokenise) -> Captions:
    """Tokenise distinct captions, a few thousand at a time; strings, or an Arrow array of them."""
    empty = tokenise([""])[0]
    pad, context = int(empty[-1]), len(empty)
    values, lengths = [np.empty(0, dtype=np.int32)], [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(captions), _TOKENISED_TOGETHER):
        part = captions[first : first + _TOKENISED_TOGETHER]
        tokens = tokenise(part.to_pylist() if isinstance(part, pa.Array) else list(part)).numpy()
        # Up to the last token that is not padding: a tokenizer may use its padding token inside.
        used = context - (tokens[:, ::-1] != pad).argmax(axis=1)
        used[(tokens == pad).all(axis=1)] = 1
        values.append(tokens[np.arange(context) < used[:, None]].astype(np.int32))
        lengths.append(used.astype(np.int64))
    return Captions(np.concatenate(values), np.concatenate(lengths).cumsum(), pad, context)
