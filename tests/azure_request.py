"""Azure's "Create Container" with a shared key: the one request that tests need and obstore does not have.

After https://learn.microsoft.com/rest/api/storageservices/authorize-with-shared-key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import urllib.request
from email.utils import formatdate


def create_container(endpoint: str, container: str, key: str) -> None:
    """Make a container; `endpoint` ends in the account's name, as Azurite's do.

    Raises:
        urllib.error.HTTPError: refused.
    """
    account = endpoint.rsplit("/", 1)[1]
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    named = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    resource = f"/{account}/{account}/{container}\nrestype:container"
    kind = "application/octet-stream"  # urllib would send one of its own
    text = "PUT" + "\n" * 5 + kind + "\n" * 7 + named + resource
    signature = hmac.digest(base64.b64decode(key), text.encode(), hashlib.sha256)
    headers["Content-Type"] = kind
    headers["Authorization"] = f"SharedKey {account}:{base64.b64encode(signature).decode()}"
    url = f"{endpoint}/{container}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers, data=b"")).close()
