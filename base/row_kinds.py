"""What a row of an evaluation set is: a sample, or a text that a task reads beside the samples.

The two columns stand in the sample table of every store that was extracted from the description of an evaluation
set; `mmkd extract` writes them and `mmkd evaluate` finds rows by them.
"""

from __future__ import annotations

from typing import Final

KIND: Final = "row_kind"
"""Column: one of the four below."""
TEXT_OF: Final = "text_of"
"""Column: the class that a prompt describes, or the key of the question that a candidate answers; else null."""

SAMPLE: Final = "sample"
PROMPT: Final = "prompt"
NEGATIVE: Final = "negative_prompt"
"""What the absence of a class looks like."""
CANDIDATE: Final = "candidate"
