"""The command that brings an extra's packages, from where this mmkd came: no registry has it."""

import json
from importlib.metadata import distributions
from urllib.parse import unquote, urlsplit


def install_command(*extras: str) -> str:
    """`pip install` for these extras, from the checkout, file or git URL that the installation records (PEP 610). Never
    a bare `mmkd[...]`: anyone could have registered that name."""
    wanted = f"[{','.join(extras)}]" if extras else ""
    # The folder that Python runs in may hold metadata too, those that a build left in a checkout, without an origin.
    recorded = (found.read_text("direct_url.json") for found in distributions(name="mmkd"))
    try:
        origin = json.loads(next(filter(None, recorded), "{}"))
    except ValueError:
        origin = {}
    url = str(origin.get("url", ""))
    if "dir_info" in origin and url.startswith("file:"):
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {editable}'{unquote(urlsplit(url).path)}{wanted}'"
    if "vcs_info" in origin:
        found = origin["vcs_info"]
        revision = found.get("requested_revision") or found.get("commit_id", "")
        url = f"{found.get('vcs', 'git')}+{url}" + (f"@{revision}" if revision else "")
    if url:
        return f"pip install 'mmkd{wanted} @ {url}'"
    return f"pip install 'WHEEL_OR_CHECKOUT{wanted}', with the place this mmkd was installed from"
