"""The core's packages and each extra's: installed, in a version that fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mmkd.base.install import install_command
from mmkd.cli.doctor.machine import Check

CORE = ""

WHOLE = "demo"
"""The extra with which every stage runs."""

_NOT_USERS = frozenset({WHOLE, "dev", "docs"})

_MODULES = {
    "PIL": "pillow", "faiss": "faiss-cpu", "open_clip": "open-clip-torch",
    "openslide": "openslide-python", "skimage": "scikit-image", "sklearn": "scikit-learn", "umap": "umap-learn",
}  # fmt: skip
"""Modules whose packages have other names."""

_STAGE = {
    "align": ("distill",), "distill": ("distill",), "evaluate": ("evaluate", "extract"), "export": ("distill",),
    "extract": ("extract",), "select": ("extract",), "store": ("inspect", "extract"), "teachers": ("extract",),
}  # fmt: skip
"""Extras in which a command looks first for what several have."""


def package_checks() -> Iterator[Check]:
    """Yield one line for the core, one for each extra, from what the installed mmkd says it needs."""
    wanted, extras = _declared()
    for extra in (CORE, *extras):
        yield extra_check(extra, needed(wanted, extra))


def _declared() -> tuple[list[Requirement], list[str]]:
    """Return what the installed mmkd needs, and its extras by name."""
    extras = metadata("mmkd").get_all("Provides-Extra") or ()
    return [Requirement(text) for text in requires("mmkd") or ()], sorted(extras)


def needed(wanted: Iterable[Requirement], extra: str) -> list[Requirement]:
    """Return requirements of the core (an empty name) or of an extra, those of extras that it names included."""
    wanted = list(wanted)
    own = [one for one in wanted if _belongs(one, extra)]
    named = [other for one in own if one.name == "mmkd" for other in sorted(one.extras)]
    return [one for one in own if one.name != "mmkd"] + [one for other in named for one in needed(wanted, other)]


def _belongs(one: Requirement, extra: str) -> bool:
    if one.marker is None:
        return extra == CORE
    return one.marker.evaluate({"extra": extra}) and (extra == CORE or not one.marker.evaluate({"extra": CORE}))


def missing_package(module: str, command: str = "") -> str:
    """Return the package or extra to install for `module` in `mmkd COMMAND`, preferring the one of its stage."""
    package = canonicalize_name(_MODULES.get(module, module))
    wanted, extras = _declared()
    having = [
        extra
        for extra in extras
        if extra not in _NOT_USERS
        and any(canonicalize_name(one.name) == package and _belongs(one, extra) for one in wanted)
    ]
    of_stage = [extra for extra in _STAGE.get(command, ()) if extra in having] or (having if len(having) == 1 else [])
    return install_command(of_stage[0] if of_stage else WHOLE)


def extra_check(extra: str, wanted: Iterable[Requirement]) -> Check:
    """Check one extra, or the core."""
    missing, old, there = [], [], []
    for one in wanted:
        try:
            found = version(canonicalize_name(one.name))
        except PackageNotFoundError:
            missing.append(one.name)
            continue
        if not one.specifier.contains(found, prereleases=True):
            old.append(f"{one.name} {found} (needs {one.specifier})")
        else:
            there.append(f"{one.name} {found}")
    name = extra or "core"
    step = install_command(extra) if extra else install_command()
    if old:
        return Check("packages", name, "warning" if extra else "fault", "wrong version: " + ", ".join(old), step)
    if missing:
        return Check("packages", name, "note" if extra else "fault", "not installed: " + ", ".join(missing), step)
    return Check("packages", name, "ok", ", ".join(dict.fromkeys(there)))
