"""Write what the documents say of the code from the code: the commands' help, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import click

from mmkd.cli.main import cli

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


def with_graph(page: str) -> str:
    """A page with what stands between the two marks made anew."""
    before, _, rest = page.partition(GRAPH_BEGINS)
    return f"{before}{GRAPH_BEGINS}{graph()}{GRAPH_ENDS}{rest.partition(GRAPH_ENDS)[2]}"


if __name__ == "__main__":
    docs = Path(__file__).parent
    (docs / "commands.md").write_text(reference(), encoding="utf-8")
    house = docs / "architecture.md"
    house.write_text(with_graph(house.read_text(encoding="utf-8")), encoding="utf-8")
