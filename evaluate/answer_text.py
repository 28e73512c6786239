"""Answers of questions as text: when two are the same, and the list of those that a model can give."""

from __future__ import annotations

import re
import string

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_X_RAY = re.compile(r"\bx[ -]?rays?\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalised(answer: object) -> str:
    """An answer without case, punctuation, articles and doubled blanks; `x-ray` and `x ray` are one word.

    The steps are those of VQA's evaluation (Antol et al. 2015, section 3.3) without its number words.
    """
    text = _X_RAY.sub("xray", str(answer if answer is not None else "").lower().strip())
    return " ".join(_ARTICLES.sub(" ", text.translate(_PUNCTUATION)).split())


def vocabulary(answers: NDArray[np.object_]) -> tuple[str, ...]:
    """Every normalised answer once, sorted: the order never depends on the run."""
    return tuple(sorted({normalised(answer) for answer in answers} - {""}))


def answer_index(answers: NDArray[np.object_], words: tuple[str, ...]) -> NDArray[np.int64]:
    """Index of every answer in the vocabulary, int64 (n,); -1 for one that is not in it."""
    index = {word: i for i, word in enumerate(words)}
    return np.array([index.get(normalised(answer), -1) for answer in answers], dtype=np.int64)
