"""`${name}` in descriptions of evaluation sets: where a user keeps things, apart from what they are.

Roots stand in a YAML file, `$MMKD_ROOTS` or `roots.yaml` in the working folder, relative to that file:

    data: /mnt/datasets
    stores: ../stores
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mmkd.base.config import read_mapping
from mmkd.base.errors import ConfigError

VARIABLE = "MMKD_ROOTS"
FILE = "roots.yaml"
SUITES = Path(__file__).resolve().parents[1] / "suites"
"""Folder of the suites that are shipped."""

_NAMED = re.compile(r"\$\{([^}]*)\}")


def user_roots() -> dict[str, str]:
    """Name to absolute folder or URL, `suites` among them; only that where there is no roots file.

    Raises:
        ConfigError: `$MMKD_ROOTS` names no such file, or a root is not text.
    """
    roots = {"suites": str(SUITES)}
    named = os.environ.get(VARIABLE)
    path = Path(named or FILE).expanduser()
    if not named and not path.is_file():
        return roots
    for name, value in read_mapping(path).items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{path}: {name} is {value!r}, expected a folder or URL")
        local = "://" not in value
        roots[str(name)] = str((path.parent / Path(value).expanduser()).resolve()) if local else value
    return roots


def filled(content: Any, roots: dict[str, str], where: Path | str) -> Any:
    """`content`, parsed YAML, with every `${name}` in its texts replaced.

    Raises:
        ConfigError: a name that is not among the roots.
    """
    if isinstance(content, dict):
        return {key: filled(value, roots, where) for key, value in content.items()}
    if isinstance(content, list):
        return [filled(value, roots, where) for value in content]
    if not isinstance(content, str):
        return content

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in roots:
            raise ConfigError(
                f"{where}: ${{{match[1]}}} has no value; write `{match[1]}: FOLDER` into {FILE} in the working folder, "
                f"or into the file that ${VARIABLE} names (it has {', '.join(sorted(roots))})"
            )
        return roots[match[1]]

    return _NAMED.sub(value_of, content)
