"""Write what the documents say of the code from the code: the commands' help, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from mmkd.cli.main import cli
from mmkd.extract.teachers.published import encoders

HEADER = """# Commands

Generated from the commands' own help by `make docs`; a test compares the two. Every error that you can fix is one line
and ends with exit status 1; wrong usage ends with 2.
"""


def sections(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[str]:
    """One section for each command below `command`, with the help that a user gets."""
    context = click.Context(
        command, parent, info_name=name, terminal_width=110, max_content_width=110, **command.context_settings
    )
    yield f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            yield from sections(found, child, context)


def reference() -> str:
    """The whole page."""
    return "\n".join([HEADER, *sections(cli, "mmkd")])


STAGES = ("cli", "extract", "distill", "evaluate", "store")
ROOT = Path(__file__).resolve().parents[1]
GRAPH_BEGINS, GRAPH_ENDS = "<!-- made by `make docs` -->\n", "<!-- end -->\n"


def imported(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmkd."):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mmkd."))


def imports_between() -> set[tuple[str, str]]:
    """Pairs of stages: a file of the first imports from the second."""
    return {
        (stage, module.split(".")[1])
        for stage in STAGES
        for path in sorted((ROOT / stage).rglob("*.py"))
        for module in imported(path)
        if module.split(".")[1] != stage
    }


def purpose(folder: Path) -> str:
    """First sentence of a package's docstring."""
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    return said.split("\n")[0]


def graph() -> str:
    """Mermaid of the stages, and a table of all folders."""
    drawn = [f"    {here} --> {there}" for here, there in sorted(imports_between())]
    lines = ["```mermaid", "flowchart TD", *drawn, "```", "", "| folder | purpose |", "|---|---|"]
    folders = (
        path.parent.relative_to(ROOT) for stage in STAGES for path in sorted((ROOT / stage).rglob("__init__.py"))
    )
    lines += [f"| `{folder}` | {purpose(folder)} |" for folder in folders]
    return "\n".join(lines) + "\n"


def encoder_table() -> str:
    """The cards of the other public encoders: facts, where they are known from, and what is not confirmed."""
    rows = ["| name | source | gated | image tower | text tower | width | license |", "|---|---|---|---|---|---|---|"]
    known = ["", "| name | pixels | known from | not confirmed |", "|---|---|---|---|"]
    for card in encoders():
        gated = "yes" if card.gated else "no"
        cells = (card.slug, card.source, gated, card.image_tower, card.text_tower, card.dim, card.license)
        rows.append(f"| {' | '.join(map(str, cells))} |")
        sources, questions = "; ".join(card.sources), "; ".join(card.open_questions) or "-"
        known.append(f"| {card.slug} | {card.pixels} | {sources} | {questions} |")
    return "\n".join([*rows, *known]) + "\n"


MADE = {"architecture.md": graph, "teachers.md": encoder_table}
"""Pages with a part that is made, between two marks."""


def with_made(name: str) -> str:
    """A page of `MADE` with what stands between the two marks made anew."""
    before, _, rest = (ROOT / "docs" / name).read_text(encoding="utf-8").partition(GRAPH_BEGINS)
    return f"{before}{GRAPH_BEGINS}{MADE[name]()}{GRAPH_ENDS}{rest.partition(GRAPH_ENDS)[2]}"


if __name__ == "__main__":
    docs = Path(__file__).parent
    (docs / "commands.md").write_text(reference(), encoding="utf-8")
    for page in MADE:
        (docs / page).write_text(with_made(page), encoding="utf-8")
