"""Every error that mmkd raises on purpose, as one small tree.

    MmkdError
    ├── UserError               something the caller asked for cannot be done as asked
    │   ├── ConfigError         a YAML file or an option that does not fit its model
    │   ├── CorpusError         a corpus that is missing, empty or not what it was
    │   └── TeacherError        a teacher that cannot be found, loaded or trusted
    └── StoreError              the store on disk is not what was expected
        ├── NotAStoreError      no mmkd store at this path
        ├── FormatVersionError  written by a newer mmkd
        ├── TeacherMismatchError  features of other weights, preprocessing or tokenizer
        ├── BusyStoreError      another process writes to it
        ├── IncompleteStoreError  rows or teachers that were asked for are not there yet
        ├── UnreachableError    a URL whose server refuses, fails or does not answer
        └── CorruptStoreError   bytes that do not match their checksum

Messages are one line: the bad value, what was expected, the next step. The command line prints
them as they are and exits with status 1:

    try:
        store = FeatureStore.open(path)
    except MmkdError as error:
        sys.exit(str(error))
"""

from __future__ import annotations


class MmkdError(Exception):
    """Base of all errors of this project."""


class UserError(MmkdError):
    """A request of the caller cannot be fulfilled."""


class ConfigError(UserError):
    """A YAML file or an option does not fit its model."""


class CorpusError(UserError):
    """A corpus is missing, empty, or not the one that the store was made from."""


class TeacherError(UserError):
    """A teacher cannot be found, loaded or trusted."""


class StoreError(MmkdError):
    """The store on disk is not as expected."""


class NotAStoreError(StoreError):
    """There is no mmkd store at this path."""


class FormatVersionError(StoreError):
    """The store was written in a format version that this mmkd does not know."""


class TeacherMismatchError(StoreError):
    """Features of other weights, preprocessing or tokenizer lie where new ones should go."""


class IncompleteStoreError(StoreError):
    """Rows or teachers that were asked for are not in the store yet."""


class BusyStoreError(StoreError):
    """Another process writes to the store."""


class UnreachableError(StoreError):
    """A URL cannot be used: refused, no such bucket, no answer. It says nothing about the bytes behind it."""


class CorruptStoreError(StoreError):
    """Bytes do not match the checksum that was recorded when they were written."""


def cause(error: BaseException, most: int = 200) -> str:
    """Return what another library's error says as one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]
