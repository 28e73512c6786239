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
    """Names that the page of `folder`, an http(s) URL, links to right below it; none when there is no such page.

    Raises:
        UnreachableError: the server refuses, fails or does not answer.
    """
    page = urllib.parse.quote(folder, safe=":/?=&%[]@+,~") + "/"
    try:
        with urllib.request.urlopen(page, timeout=_SECONDS) as answer:  # noqa: S310 - http(s), the caller sees to it
            text = answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return []
        raise UnreachableError(
            f"{page} gives no list of its files ({error.code} {error.reason}); serve the folder with an index"
        ) from error
    except OSError as error:
        raise UnreachableError(f"{page} cannot be reached: {error}; check the URL") from error
    names = (urllib.parse.unquote(html.unescape(link)).rstrip("/") for link in _LINK.findall(text))
    return list(dict.fromkeys(name for name in names if name and "/" not in name and name[0] not in ".?#"))
