"""Loader lookup: ours by name, a user's by entry point, or by the files present."""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.plan import FileLoader, TeacherLoader
from mmkd.extract.teachers.source import read_json, source_of
from mmkd.extract.teachers.spec import AUTO, HF_HUB, LOCAL_DIR, TeacherSpec

ENTRY_POINTS = "mmkd.teachers"
"""Group in which another package offers loaders; each entry is an object with `describe` and `load`."""

LOADERS = {
    "open_clip": "mmkd.extract.teachers.open_clip_model",
    "transformers": "mmkd.extract.teachers.transformers_model",
    "pmc_clip": "mmkd.extract.teachers.pmc_clip",
    "medclip": "mmkd.extract.teachers.medclip",
}
"""Loaders by name, and the modules whose `LOADER` they are; `auto` tries them in this order."""


def loader_names() -> list[str]:
    """Return every loader that can be named, those of installed packages included."""
    return [*LOADERS, *sorted(_plugins())]


def find_loader(spec: TeacherSpec) -> TeacherLoader:
    """Return the loader of `spec`. Raises TeacherError if there is no such loader, a broken entry point, or files that
    no loader of ours recognizes."""
    scheme = spec.source.partition(":")[0]
    if spec.loader == AUTO and f"{scheme}:" in (LOCAL_DIR, HF_HUB):
        return _recognizing_loader(spec)
    name = scheme if spec.loader == AUTO else spec.loader
    if name in LOADERS:
        return _built_in(name)
    plugins = _plugins()
    if name not in plugins:
        near = difflib.get_close_matches(name, loader_names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(loader_names())}"
        raise TeacherError(f"teacher {spec.slug!r}: there is no loader {name!r}; {hint}")
    return _load_plugin(plugins[name])


def _built_in(name: str) -> FileLoader:
    loader: FileLoader = import_module(LOADERS[name]).LOADER
    return loader


def _load_plugin(entry: EntryPoint) -> TeacherLoader:
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise TeacherError(
            f"entry point {entry.name!r} ({entry.value}) cannot be loaded: {error}; reinstall its package"
        ) from error
    lacking = [method for method in ("describe", "load") if not callable(getattr(found, method, None))]
    if lacking:
        raise TeacherError(
            f"entry point {entry.name!r} ({entry.value}) has no method {' and no '.join(lacking)}; see docs/teachers.md"
        )
    loader: TeacherLoader = found
    return loader


def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}


def _recognizing_loader(spec: TeacherSpec) -> FileLoader:
    source = source_of(spec)
    loaders = [_built_in(name) for name in LOADERS]
    for loader in loaders:
        if loader.recognizes(spec, source):
            return loader
    config = source.find("config.json")
    kind = read_json(config).get("model_type") if config is not None else None
    what = f"a config.json of type {kind!r}" if config is not None else "no open_clip_config.json and no config.json"
    raise TeacherError(
        f"teacher {spec.slug!r}: {spec.source} has {what}{source.listing()}; expected "
        f"{' or '.join(loader.reads for loader in loaders if loader.reads)}; for a bare checkpoint write a YAML card "
        "with loader and options.architecture"
    )
