"""The import graph of a source tree: every import statement, at any depth, type-checking blocks included."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path


def import_graph(root: Path, folders: Sequence[str], package: str = "mmkd") -> dict[str, set[str]]:
    """Modules below `folders` of `root`, each with the modules of the same package that it imports."""
    modules = {
        ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"): path
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    }
    graph: dict[str, set[str]] = defaultdict(set)
    for module, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module or "" for name in inner]
            graph[module] |= {name for name in names if name in modules and name != module}
    return dict(graph)


def import_circle(graph: Mapping[str, set[str]]) -> list[str]:
    """One circle of modules that import each other, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []
