"""Rows of an evaluation set: samples, and the texts that tasks read beside them; the prompt file of such texts.

The columns `row_kind` and `text_of` are in the sample table of every store that was extracted from the description
of an evaluation set: `mmkd extract` writes them and `mmkd evaluate` finds rows by them. A prompt file:

    templates: ["a photo of {}", "{} seen under the microscope"]    # without templates the texts are whole sentences
    classes:
      adenocarcinoma: [adenocarcinoma, glandular carcinoma]         # each text with each template is a prompt
      benign: [benign tissue]
    negatives:                                                      # for several labels per image: a class' absence
      adenocarcinoma: [no tumour]
"""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Final, NamedTuple

from pydantic import BeforeValidator, Field

from mmkd.base.config import Frozen, read_mapping, validated

KIND: Final = "row_kind"
"""Column: one of the four below."""
TEXT_OF: Final = "text_of"
"""Column: the class that a prompt describes, or the key of the question that a candidate answers; else null."""

SAMPLE: Final = "sample"
PROMPT: Final = "prompt"
NEGATIVE: Final = "negative_prompt"
"""Text that describes the absence of a class."""
CANDIDATE: Final = "candidate"

PLACE = "{}"
"""Placeholder of a class' text in a template."""


def _texts_by_class(value: object) -> object:
    """Return class names as text: YAML makes numbers and truth values of some."""
    if not isinstance(value, dict):
        return value
    if wrong := [name for name in value if isinstance(name, bool)]:
        raise ValueError(f"YAML reads a class name as {wrong[0]}; put it in quotes")
    return {str(name): [texts] if isinstance(texts, str) else texts for name, texts in value.items()}


Sentence = Annotated[str, Field(pattern=r"\S")]
TextsByClass = Annotated[dict[str, tuple[Sentence, ...]], BeforeValidator(_texts_by_class)]


class Prompt(NamedTuple):
    """One text: its meaning, its class, and its number within that class."""

    kind: str
    of: str
    number: int
    text: str

    @property
    def key(self) -> str:
        return f"{self.kind}:{self.of}:{self.number}"


class PromptFile(Frozen):
    """Texts of every class; each is combined with each template."""

    templates: tuple[str, ...] = (PLACE,)
    classes: TextsByClass = Field(min_length=1)
    negatives: TextsByClass = Field(default_factory=dict)
    notes: str = ""

    def faults(self) -> Iterator[str]:
        wrong = [template for template in self.templates if template.count(PLACE) != 1]
        if wrong or not self.templates:
            yield f"template {wrong[0] if wrong else ''!r} must have one {PLACE}, where the class goes"
        for name, texts in chain(self.classes.items(), self.negatives.items()):
            if not texts:
                yield f"class {name!r} has no text"
            if twice := [text for text, count in Counter(texts).items() if count > 1]:
                yield f"class {name!r} has the text {twice[0]!r} twice"
        if alien := [name for name in self.negatives if name not in self.classes]:
            yield f"negatives of {alien[0]!r}, which is not among the classes {', '.join(self.classes)}"

    def prompts(self) -> Iterator[Prompt]:
        """Yield every text, class by class in the order of the file."""
        for kind, classes in ((PROMPT, self.classes), (NEGATIVE, self.negatives)):
            for name, texts in classes.items():
                written = [template.replace(PLACE, text) for text in texts for template in self.templates]
                yield from (Prompt(kind, name, number, text) for number, text in enumerate(written))


def read_prompts(path: Path) -> PromptFile:
    """Read a prompt file. Raises ConfigError if it is missing, not YAML, or not prompts; the message names the key."""
    return validated(PromptFile, read_mapping(path), path)
