"""What lies in a folder of a web server: the links of the page that it makes of the folder.

Plain HTTP has no other listing. `python -m http.server`, nginx (`autoindex on`) and Apache (`Options +Indexes`) make
such pages.
"""

from __future__ import annotations

import html
import re
import urllib.error
import urllib.parse
import urllib.request

from mmkd.base.errors import UnreachableError

_LINK = re.compile(r"""<a\s[^>]*?href=["']?([^"'>\s]+)""", re.IGNORECASE)
_SECONDS = 60


def linked_names(folder: str) -> list[str]:
    """Names directly below `folder`, an http(s) URL, folders with a `/` at the end; none if it does not exist.

    A server without listings answers 404, or the same page for every address, as if the folder were absent. So a page
    without names counts only if the page of the folder above has names: there, what is not listed does not exist.

    Raises:
        UnreachableError: the server gives no listing, refuses, fails or does not answer.
    """
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
    """Names that the page of `folder` links to directly below it; None when there is no page (404)."""
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
