"""The fenced blocks of the documents, found by a Markdown parser."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
# commands.md is made from the commands' own help; a test holds it to that.
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "commands.md"),
)


@dataclass(frozen=True)
class Fence:
    """A block between fences: where it stands, what it is said to be, and its text."""

    document: Path
    line: int
    language: str
    skip: str
    """Why a test cannot run it: ```` ```bash skip="needs Slurm" ````."""
    text: str

    @property
    def place(self) -> str:
        """`docs/x.md:12`."""
        return f"{self.document.relative_to(ROOT)}:{self.line}"


@cache
def fences(document: Path) -> tuple[Fence, ...]:
    """All fenced blocks of a document in order."""
    found = []
    for token in MarkdownIt().parse(document.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, *options = shlex.split(token.info) or [""]
            skip = next((value.removeprefix("skip=") for value in options if value.startswith("skip=")), "")
            line = (token.map or [0])[0] + 1
            found.append(Fence(document, line, language, skip, token.content))
    return tuple(found)


def commands_in(text: str) -> list[list[str]]:
    """The `mmkd ...` commands of a block or of inline code: continued lines joined, comments and redirections cut."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # prose with an apostrophe, or a program in quotes over several lines
            words = line.split()
        while "mmkd" in words:
            words = words[words.index("mmkd") + 1 :]
            ends = [n for n, word in enumerate(words) if word in ("|", "&&", ";", ">", "2>", "||", "mmkd")]
            commands.append(words[: ends[0]] if ends else words)
    return commands
