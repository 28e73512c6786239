"""Every place that a command writes to refuses a device, a pipe, a dangling link and a path of the wrong kind in one
line, and leaves it as it was."""

from __future__ import annotations

import os
import pty
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import click
import h5py
import numpy as np
import pytest
import yaml
from tiny_run import write_run, write_scene
from tiny_store import make_card, make_store

from mmkd.base.places.remote import as_root
from mmkd.cli.main import cli, main

SECONDS = 120
"""After which a command that waits for a pipe counts as stuck."""


class Output(NamedTuple):
    """A command that writes to a path."""

    command: str
    folder: bool
    """It writes a folder there, not a file."""
    arguments: Callable[[Path, Path], list[object]]
    """Of the scene and the path that it shall write to."""


def run_yaml(scene: Path, out: Path) -> Path:
    path = write_run(scene, "out")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"out": str(out)}))
    return path


def align_yaml(scene: Path, out: Path) -> Path:
    path = scene / "align.yaml"
    path.write_text(yaml.safe_dump({"out": str(out), "method": {"pca": {}}, "dim": 4}))
    return path


def exported(layout: str, *options: object) -> Callable[[Path, Path], list[object]]:
    return lambda scene, out: ["store", "export", scene / "store", out, "--layout", layout, *options]


def evaluated(*command: object) -> Callable[[Path, Path], list[object]]:
    return lambda scene, out: ["evaluate", command[0], scene / "suite.yaml", *command[1:], out]


OUTPUTS = [
    Output("demo directory", True, lambda scene, out: ["demo", out]),
    Output("demo directory", True, lambda scene, out: ["demo", out, "--corpus-only"]),
    Output(
        "teachers convert folder",
        True,
        lambda scene, out: ["teachers", "convert", f"one=local-dir:{scene / 'one'}", out],
    ),
    Output(
        "extract store",
        True,
        lambda scene, out: ["extract", scene / "corpus", out, "--teachers", f"one=local-dir:{scene / 'one'}"],
    ),
    Output("store import path", True, lambda scene, out: ["store", "import", scene / "bags", out]),
    Output("store subset out", True, lambda scene, out: ["store", "subset", scene / "store", out]),
    Output("store merge out", True, lambda scene, out: ["store", "merge", scene / "store", out]),
    Output("store pull out", True, lambda scene, out: ["store", "pull", scene / "store", out]),
    Output("store export out", True, exported("npy")),
    Output("store export out", True, exported("parquet")),
    Output("store export out", True, exported("safetensors")),
    Output("store export out", True, exported("original", "--allow-loss", "all")),
    Output("store export out", True, exported("zarr", "--codec", "gzip")),
    Output(
        "store atlas out",
        False,
        lambda scene, out: ["store", "atlas", scene / "store", "--teacher", "alpha", "--out", out],
    ),
    Output("store report out", False, lambda scene, out: ["store", "report", scene / "store", out]),
    Output("align run", False, lambda scene, out: ["align", scene / "store", align_yaml(scene, out)]),
    Output("distill run", True, lambda scene, out: ["distill", run_yaml(scene, out)]),
    Output("export out", True, lambda scene, out: ["export", scene / "runs/first", out]),
    Output("evaluate run out", True, evaluated("run", "--jobs", 1, "--out")),
    Output("evaluate figure file", False, evaluated("figure", "heat-map", "--model", "alpha")),
    Output("evaluate report file", False, evaluated("report", "--model", "alpha")),
    Output("evaluate leakage hashes", False, evaluated("leakage", "--hashes")),
    Output("evaluate leaderboard file", False, evaluated("leaderboard")),
    Output("evaluate merge out", True, lambda scene, out: ["evaluate", "merge", out, *[scene / "suite-results"] * 2]),
]

INPUTS = {
    "doctor folder",
    "teachers check images",
    "teachers check golden",
    "store append path",
    "store fold path",
    "store diff one",
    "store diff other",
    "store tag path",
    "store atlas path",
    "store export path",
    "store info path",
    "store verify path",
    "store import original",
    "store neighbors path",
    "store neighbors image",
    "store pull url",
    "store relocate path",
    "store relocate folder",
    "store report path",
    "store show path",
    "store stats path",
    "store subset path",
    "store subset keys",
    "store merge paths",
    "export run",
    "evaluate check suite",
    "evaluate run suite",
    "evaluate table suite",
    "evaluate table out",  # the results that are read
    "evaluate compare suite",
    "evaluate compare out",
    "evaluate figure suite",
    "evaluate figure out",
    "evaluate report suite",
    "evaluate report out",
    "evaluate subgroups suite",
    "evaluate subgroups out",
    "evaluate trust suite",
    "evaluate trust out",  # the results, below which it writes
    "evaluate corruptions suite",
    "evaluate corruptions out",
    "evaluate merge folders",
    "evaluate leaderboard suite",
    "evaluate leaderboard out",
    "evaluate claim suite",
    "evaluate claim out",
    "evaluate leakage suite",
    "evaluate leakage training",
}
"""Paths that are only read, or that hold a store already."""


def path_parameters(command: click.Command, names: tuple[str, ...] = ()) -> Iterator[str]:
    """Command and name of every parameter that is a path or a store."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from path_parameters(below, (*names, name))
        return
    for parameter in command.params:
        if isinstance(parameter.type, click.Path) or getattr(parameter.type, "func", None) is as_root:
            yield " ".join((*names, str(parameter.name)))


def test_every_path_of_every_command_is_an_input_or_tried_as_an_output() -> None:
    assert set(path_parameters(cli)) == INPUTS | {output.command for output in OUTPUTS}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store, bags, a suite that was run, teachers, a corpus, and a training run."""
    root = write_scene(tmp_path_factory.mktemp("outputs"), rows=60)
    make_store(root / "store", 600, [make_card("alpha", 8), make_card("beta", 16)])
    (root / "bags").mkdir()
    with h5py.File(root / "bags/slide.h5", "w") as file:
        file["features"] = np.ones((3, 4), np.float32)
        file["coords"] = np.arange(6).reshape(3, 2)
    dataset = {"dataset": "sites", "label": "site", "rows": {"test": {"key": [f"k{i}" for i in range(100)]}}}
    dataset |= {"prompts": {"rows": {"key": ["k597", "k598", "k599"]}}, "tasks": ["zero_shot"]}
    suite = {"suite": "small", "store": "store", "bootstrap": {"n": 100}, "datasets": [dataset]}
    (root / "suite.yaml").write_text(yaml.safe_dump(suite))
    first = write_run(root, "first", epochs=1, batch_size=8)
    for command in (["evaluate", "run", root / "suite.yaml", "--jobs", 1], ["distill", first]):
        status, lines = outcome(command)
        assert status == 0, lines
    return root


def stuck(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def outcome(command: list[object]) -> tuple[int, list[str]]:
    """Exit status of a command, and what it wrote to standard error."""
    arguments, sys.argv = sys.argv, ["mmkd", *map(str, command)]
    errors = StringIO()
    signal.signal(signal.SIGALRM, stuck)
    signal.alarm(SECONDS)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(errors):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), errors.getvalue().splitlines()
    finally:
        signal.alarm(0)
        sys.argv = arguments
    return 0, errors.getvalue().splitlines()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    """A node of its own like /dev/null; where only a pipe may be made, a terminal of its own."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        path.symlink_to(os.ttyname(pty.openpty()[1]))


def dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def other_kind(path: Path) -> None:
    """A file where a folder is written is made below; this is a folder that holds something."""
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def regular_file(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.integration
@pytest.mark.parametrize("obstacle", [pipe, device, dangling_link, other_kind, regular_file])
@pytest.mark.parametrize("output", OUTPUTS, ids=[f"{i}-{one.command}" for i, one in enumerate(OUTPUTS)])
def test_an_output_that_cannot_be_written_is_left_as_it_was(
    scene: Path, tmp_path: Path, output: Output, obstacle: Callable[[Path], None]
) -> None:
    if obstacle is regular_file and not output.folder:
        pytest.skip("a regular file may be replaced")
    if obstacle is other_kind and output.command in ("demo directory", "evaluate run out", "distill run"):
        pytest.skip("writes beside what is in the folder")
    path = tmp_path / (
        "out.html"
        if "report" in output.command or "leaderboard" in output.command
        else "out.png"
        if "figure" in output.command
        else "out"
    )
    obstacle(path)
    before = path.lstat()
    link = path.readlink() if path.is_symlink() else None
    held = path.read_text() if obstacle is regular_file else None
    status, lines = outcome(output.arguments(scene, path))
    assert status in (1, 2), lines
    said = [line for line in lines if line.startswith("Error: ")]
    assert len(said) == 1, lines
    assert "out" in said[0]
    assert not any(line.startswith("Traceback") for line in lines), lines
    after = path.lstat()
    assert (before.st_mode, before.st_ino, before.st_dev, before.st_rdev) == (
        after.st_mode,
        after.st_ino,
        after.st_dev,
        after.st_rdev,
    )
    assert (path.readlink() if path.is_symlink() else None) == link
    assert (path.read_text() if obstacle is regular_file else None) == held
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name]
    if obstacle is other_kind:
        assert [entry.name for entry in path.iterdir()] == ["thesis.tex"]
