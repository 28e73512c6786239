"""Connections to object stores and web servers: obstore's errors as ours, and the pages that list a web folder. Plain
HTTP has no listing. `python -m http.server`, nginx (`autoindex on`) and Apache (`Options +Indexes`) make pages of links
instead, which obstore does not read."""

import errno
import html
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, lru_cache
from typing import Any

from mmkd.base.errors import UnreachableError

_LINK = re.compile(r"""<a\s[^>]*?href=["']?([^"'>\s]+)""", re.IGNORECASE)
_SECONDS = 60
_STALLED = "60s"
"""Without a byte of an answer. Not for writing: the answer to a large object may take longer."""


@cache
def _memory(origin: str) -> Any:
    """Return the objects of a `memory://` origin: what is written must be what is read."""
    from obstore.store import MemoryStore  # noqa: PLC0415

    return MemoryStore()


@lru_cache(maxsize=32)
def server(origin: str, *, reading: bool = False) -> Any:
    """Return the obstore store of a bucket or host, one for the life of the process; `memory://` lives as long. One for
    `reading` asks again when an answer stalls. Raises UnreachableError if the environment holds settings that it cannot
    use."""
    from obstore.store import from_url  # noqa: PLC0415 - an extra: only stores behind URLs need it

    if origin.startswith("memory:"):
        return _memory(origin)
    # Plain http is what the user asked for when the endpoint says so; the clouds' own endpoints are https.
    options = {"allow_http": True, "connect_timeout": "10s", "timeout": "10m", "user_agent": "mmkd"}
    if reading:
        options["read_timeout"] = _STALLED
    retries = {"max_retries": 4, "retry_timeout": timedelta(minutes=10)}
    with answered(origin):
        return from_url(origin, client_options=options, retry_config=retries)


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
    """Return cause and next step, from obstore's message without its debug dump and the server's page."""
    text = " ".join(str(error).split("\n\nDebug source")[0].split())
    code = re.search(r"<Code>(\w+)</Code>", text)
    status = re.search(r"status code: (\d{3} [A-Za-z ]+)", text)
    if "NoSuchBucket" in text:
        return "cannot be used: the bucket does not exist; check its name and the endpoint"
    if "following redirect" in text or re.match(r"30\d", status[1] if status else "") or "without LOCATION" in text:
        return "is redirected by its server to nowhere; name the final address (for S3, the bucket's AWS_REGION)"
    if code or status:
        reason = ", ".join(found[1].strip() for found in (status, code) if found)
    else:
        request = r"Error performing \w+ \S+?( in [\d.]+\w?s)?(, after \d+ retries, .*?: \d+s )?( -|:|-) "
        where = rf"^Generic \w+ error: ({request})?(HTTP error: )?"
        reason = re.sub(where, "", text)[:200].replace("error sending request", "no answer")
    if isinstance(error, PermissionError) or re.match(r"40[13]\b", reason) or "Unauthenticated" in type(error).__name__:
        return f"is refused by its server ({reason}); check the credentials in the environment"
    return f"cannot be used: {reason}; check the URL and the endpoint"


def linked_names(folder: str) -> list[str]:
    """Return names directly below `folder`, an http(s) URL, folders with a `/` at the end; none if it does not exist. A
    server without listings answers 404, or the same page for every address, as if the folder were absent. So a page
    without names counts only if the page of the folder above has names: there, what is not listed does not exist.
    Raises UnreachableError if the server gives no listing, refuses, fails or does not answer."""
    names = _page_names(folder)
    if names:
        return names
    parent, _, name = folder.rstrip("/").rpartition("/")
    listed = _page_names(parent) if parent.count("/") > 1 else None
    if not listed or (names is None and f"{name}/" in listed):
        raise UnreachableError(
            f"{folder}/ gives no list of its files; serve the folder with an index (nginx: `autoindex on`), or copy it"
        )
    return []


def _page_names(folder: str) -> list[str] | None:
    """Return names that the page of `folder` links to directly below it; None when there is no page (404)."""
    page = urllib.parse.quote(folder, safe=":/?=&%[]@+,~") + "/"
    try:
        with urllib.request.urlopen(page, timeout=_SECONDS) as answer:  # noqa: S310 - http(s), the caller sees to it
            text, base = answer.read().decode("utf-8", "replace"), answer.geturl()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise UnreachableError(
            f"{page} gives no list of its files ({error.code} {error.reason}); serve the folder with an index"
        ) from error
    except OSError as error:
        raise UnreachableError(f"{page} cannot be reached: {error}; check the URL") from error
    base = base.partition("?")[0].partition("#")[0]
    here = urllib.parse.unquote(urllib.parse.urlsplit(base).path)
    names = []
    for link in _LINK.findall(text):
        target = urllib.parse.urlsplit(urllib.parse.urljoin(base, html.unescape(link)))
        path = urllib.parse.unquote(target.path)
        below = path.removeprefix(here)
        if target.netloc == urllib.parse.urlsplit(base).netloc and path.startswith(here) and below and not target.query:
            names.append(below)
    return list(dict.fromkeys(name for name in names if "/" not in name[:-1] and not name.startswith(".")))
