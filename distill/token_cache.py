"""Tokens of a run's captions, kept in its folder: millions of captions take minutes to tokenise, and seconds to read.

`OUT/tokens.npz` holds what `Captions` holds, and a digest of the captions. It is no part of a run's state: a file that
is missing, damaged, of other captions or of another tokenizer is written anew.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmkd.base.files import write_atomically
from mmkd.distill.captions import Captions, tokenised
from mmkd.distill.student import Tokenise

FILE = "tokens.npz"
WORTH_KEEPING = 100_000
"""Fewer captions are tokenised in seconds."""
_HASHED_TOGETHER = 65536
PROBED = 256
"""Captions, spread evenly, that are tokenised again to see that the tokenizer is the same."""


def kept_tokens(out: Path, captions: pa.Array, tokenise: Tokenise) -> Captions:
    """The captions as tokens, from `out` when they are there.

    Args:
        out: folder of the run.
        captions: distinct captions, in order, an Arrow array of strings.
        tokenise: the student's tokenizer.
    """
    if len(captions) < WORTH_KEEPING:
        return tokenised(captions, tokenise)
    found = _read(out / FILE, _digest(captions))
    if found is not None and _same_tokenizer(found, captions, tokenise):
        return found
    logging.getLogger(__name__).info("tokenising %d captions; resuming this run will read them", len(captions))
    return tokenised(captions, tokenise)


def keep_tokens(out: Path, captions: pa.Array, made: Captions) -> None:
    """Keep a run's tokens when it begins, unless they are kept already or soon made again.

    Raises:
        StoreError: the disk is full or read-only.
    """
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


def _same_tokenizer(found: Captions, captions: pa.Array, tokenise: Tokenise) -> bool:
    probed = np.unique(np.linspace(0, len(captions) - 1, PROBED).astype(np.int64))
    now = tokenised(captions.take(pa.array(probed)), tokenise)
    if (now.pad, now.context) != (found.pad, found.context):
        return False
    return bool(np.array_equal(found.tokens(probed, found.context), now.tokens(np.arange(len(probed)), now.context)))
