"""How a command ends: one line for what the user can mend, a traceback for what only we can."""

from __future__ import annotations

import errno
from collections.abc import Callable

import click
import pytest

from mmkd.base.errors import UserError
from mmkd.cli import main as entry


def ends(monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> int | str | None:
    """The exit status of `mmkd` when its command does this."""
    monkeypatch.setattr(entry, "cli", command)
    with pytest.raises(SystemExit) as stop:
        entry.main()
    return stop.value.code


def raises(error: Exception) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no such rule"), "Error: no such rule\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.csv/out"), "Error: a.csv/out: Not a directory\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "Error: /etc/x: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "Error: No space left on device\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(monkeypatch, raises(error)) == 1
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone", "x"), OSError("no number"), KeyError("x")])
def test_what_may_be_our_fault_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "cli", raises(error))
    with pytest.raises(type(error)):
        entry.main()


def test_ctrl_c_is_one_word(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def waits() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.sys, "argv", ["mmkd"])
    assert ends(monkeypatch, waits) == 1
    assert capsys.readouterr().err.strip() == "Aborted!"
