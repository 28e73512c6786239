"""Packages of extras: the command that brings them, from where this mmkd came: no registry has it."""

import importlib
import json
from importlib.metadata import distributions
from typing import Any
from urllib.parse import unquote, urlsplit

from mmkd.base.errors import UserError


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


def import_extra(module: str, extra: str, what: str, instead: str = "") -> Any:
    """Import a module that an extra has, or that needs it. Raises UserError if it is not installed: `what` needs it,
    how to install it, and what to do `instead`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = error.name or module
        raise UserError(f"{what} needs the package {name!r}: {install_command(extra)}{instead}") from error
