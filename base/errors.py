"""Every error that mmkd raises on purpose, as one small tree. Messages are one line: the bad value, what was expected,
the next step. The command line prints them as they are and exits with status 1."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


class MmkdError(Exception):
    """Base of all errors of this project."""

    def __str__(self) -> str:
        """Return one line: control characters in a value that is quoted stay visible, those of a terminal too."""
        return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], super().__str__())


class UserError(MmkdError):
    """Something the caller asked for cannot be done as asked."""


class ConfigError(UserError):
    """A YAML file or an option does not fit its model."""


class CorpusError(UserError):
    """A corpus is missing, empty, or not the one that the store was made from."""


class TeacherError(UserError):
    """A teacher cannot be found, loaded or trusted."""


class DeviceError(UserError):
    """A GPU cannot be used, or answers no more."""

    worker = ""
    """Address of the worker that has it."""


class StoreError(MmkdError):
    """The store on disk is not what was expected."""


class NotAStoreError(StoreError):
    """There is no mmkd store at this path."""


class FormatVersionError(StoreError):
    """The store was written in a format version that this mmkd does not know."""


class TeacherMismatchError(StoreError):
    """The store has features of other weights, preprocessing or tokenizer under this name."""


class IncompleteStoreError(StoreError):
    """Rows or teachers that were asked for are not in the store yet."""


class BusyStoreError(StoreError):
    """Another process writes to the store."""


class UnreachableError(StoreError):
    """A URL cannot be used: refused, no such bucket, no answer. It says nothing about the bytes behind it."""


class CorruptStoreError(StoreError):
    """Bytes do not match the checksum that was recorded when they were written."""


@contextmanager
def collect(problems: list[str]) -> Iterator[None]:
    """Append the message of an error of this project to `problems` instead of raising it."""
    try:
        yield
    except MmkdError as error:
        problems.append(str(error))


def cause(error: BaseException, most: int = 200) -> str:
    """Return what another library's error says as one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]


@contextmanager
def faults_as(
    kind: Callable[[str], MmkdError],
    errors: type[Exception] | tuple[type[Exception], ...],
    fault: str,
    advice: str = "",
) -> Iterator[None]:
    """Raise an error of this project for another library's: the fault, what the library says, and the advice."""
    try:
        yield
    except errors as error:
        raise kind(f"{fault} ({getattr(error, 'strerror', None) or cause(error)}){advice}") from error


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return a question for the known name that is most like `name`, or `otherwise` if none is."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else otherwise
