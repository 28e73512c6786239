"""The documents cannot lie: every command has help and stands in them, what they link to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mmkd.cli.main import COMMANDS, SUMMARIES, cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(group: click.Group = cli, prefix: str = "mmkd") -> Iterator[tuple[str, click.Command]]:
    """All commands with their full names."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield f"{prefix} {name}", command
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")


ALL = dict(commands())


@pytest.mark.parametrize("name", ALL)
def test_a_command_has_help_and_stands_in_the_documents(name: str) -> None:
    command = ALL[name]
    assert command.help, f"{name} has no help"
    assert any(name in document.read_text(encoding="utf-8") for document in DOCUMENTS), f"no document names `{name}`"


@pytest.mark.parametrize("name", ALL)
def test_a_command_has_at_most_eight_options_and_all_have_help(name: str) -> None:
    options = [parameter for parameter in ALL[name].params if isinstance(parameter, click.Option)]
    assert len(options) <= 8
    assert [option.name for option in options if not option.help] == []


def test_the_summaries_in_the_group_are_of_its_commands() -> None:
    assert list(SUMMARIES) == list(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for command in re.findall(r"^\s*(?:\$ )?mmkd ([a-z][a-z-]*)(?: ([a-z][a-z-]*))?", text, flags=re.MULTILINE):
        first, second = command
        assert f"mmkd {first}" in ALL, f"{document.name} names `mmkd {first}`"
        if isinstance(ALL[f"mmkd {first}"], click.Group) and second:
            assert f"mmkd {first} {second}" in ALL, f"{document.name} names `mmkd {first} {second}`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names `make {target}`"


def test_the_command_reference_is_what_make_docs_writes() -> None:
    # In a process of its own: click keeps the help option of a command as it was when it was first asked for.
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import generate; print(generate.reference(), end='')"
    )
    made = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == made, "run `make docs`"
