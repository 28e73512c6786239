"""Connections to object stores by obstore, and its errors as ours."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any

from mmkd.base.errors import UnreachableError


@lru_cache(maxsize=32)
def server(origin: str) -> Any:
    """The obstore store of a bucket or host, one for the life of the process; `memory://` lives as long.

    Raises:
        UnreachableError: the environment holds settings that it cannot use.
    """
    from obstore.store import from_url  # noqa: PLC0415 - an extra: only stores behind URLs need it

    if origin.startswith("memory:"):
        return from_url("memory:///")
    # Plain http is what the user asked for when the endpoint says so; the clouds' own endpoints are https.
    options = {"allow_http": True, "connect_timeout": "10s", "timeout": "10m", "user_agent": "mmkd"}
    retries = {"max_retries": 4, "retry_timeout": timedelta(minutes=10)}
    with answered(origin):
        return from_url(origin, client_options=options, retry_config=retries)


@lru_cache(maxsize=32)
def filesystem(origin: str) -> Any:
    """An fsspec filesystem over the connection that is there already, with names inside the bucket as paths."""
    from obstore.fsspec import FsspecStore  # noqa: PLC0415

    class Bucket(FsspecStore):  # type: ignore[misc]
        protocol = "s3"  # of no account: the connection is made
        cachable = False

        def _split_path(self, path: str) -> tuple[str, str]:
            return "", path

        def _construct_store(self, bucket: str) -> Any:
            return server(origin)

        def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
            # Not every web server answers for a part of a file.
            whole = origin.startswith("http")
            return io.BytesIO(self.cat_file(path)) if whole else super()._open(path, *args, **kwargs)

    return Bucket()


@contextmanager
def answered(url: str) -> Iterator[None]:
    """Turn what obstore raises into FileNotFoundError, FileExistsError or one line of ours."""
    from obstore import exceptions  # noqa: PLC0415

    try:
        yield
    except (FileNotFoundError, exceptions.NotFoundError):
        raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
    except (FileExistsError, exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise FileExistsError(errno.EEXIST, "the object is there already", url) from None
    except (exceptions.BaseError, OSError, ValueError, NotImplementedError) as error:
        raise UnreachableError(f"{url} {_fault(error)}") from error


def _fault(error: BaseException) -> str:
    """What went wrong and what to do, of obstore's message without its debug dump and the server's page."""
    text = " ".join(str(error).split("\n\nDebug source")[0].split())
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status code: (\d{3} [A-Za-z ]+)", text)
    if "NoSuchBucket" in text:
        return "cannot be used: the bucket does not exist; check its name and the endpoint"
    if code or status:
        reason = ", ".join(found[1].strip() for found in (status, code) if found)
    else:
        reason = re.sub(r" in [\d.]+\w?s, after .*? - ", ": ", text)[:200]
    if isinstance(error, PermissionError) or re.match(r"40[13]\b", reason) or "Unauthenticated" in type(error).__name__:
        return f"is refused by its server ({reason}); check the credentials in the environment"
    return f"cannot be used: {reason}; check the URL and the endpoint"
