"""Answers of questions as text: when two are the same, and the list of those that a model can give."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\s+(?=\w)")
_X_RAY = re.compile(r"\bx[ -]?rays?\b")
_NO_MEANING = re.compile(r"""
    [!"\#$&'()*,;?@\[\\\]^_`{|}~]     # punctuation; signs and relations stay: ER+, > 2, 5 %
    | [./:] (?!\d) | (?<!\d) [./:]     # except in numbers: 1.5, 1/2
    | (?<=\s)-(?=\s) | (?<=[^\W\d])-(?=\w) | (?<=\w)-(?=[^\W\d])  # a hyphen in a word, no sign: t1-weighted, not ER-
    """, re.VERBOSE)  # fmt: skip


def normalised(answer: object) -> str:
    """An answer without case, punctuation, articles before a word and doubled blanks; `x-ray` and `x ray` are one word.

    The steps are those of VQA's evaluation (Antol et al. 2015, section 3.3) without its number words. What tells two
    answers apart stays: signs (`ER+`, `ER-`, `-5`), relations (`>2`), fractions, and `A` as an answer of its own.
    """
    text = str(answer if answer is not None else "").lower().strip()
    text = _X_RAY.sub("xray", re.sub("[\u2010-\u2015\u2212]", "-", text))
    return " ".join(_ARTICLES.sub(" ", " ".join(_NO_MEANING.sub(" ", text).split())).split())


def vocabulary(answers: NDArray[np.object_]) -> tuple[str, ...]:
    """Every normalised answer once, sorted: the order never depends on the run."""
    return tuple(sorted({normalised(answer) for answer in answers} - {""}))


def answer_index(answers: NDArray[np.object_], words: tuple[str, ...]) -> NDArray[np.int64]:
    """Index of every answer in the vocabulary, int64 (n,); -1 for one that is not in it."""
    index = {word: i for i, word in enumerate(words)}
    return np.array([index.get(normalised(answer), -1) for answer in answers], dtype=np.int64)
