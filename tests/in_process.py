"""Extraction inside the test's own process: load teachers, do what is left shard by shard, compare every file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from mmkd.base.images.recipe import Recipe
from mmkd.extract.corpora import open_corpus
from mmkd.extract.decoding import Threads
from mmkd.extract.derived import append_pictures
from mmkd.extract.encode import Workbench
from mmkd.extract.index import create_indexed_store
from mmkd.extract.plan import plan_tasks
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import Teacher, describe_teacher, load_teacher, parse_teachers
from mmkd.store import FeatureStore
from mmkd.store.record import Store
from mmkd.store.writer import add_teacher


def load(folders: dict[str, Path], *names: str) -> dict[str, Teacher]:
    """Load teachers as extraction does."""
    torch.set_num_threads(1)
    specs = parse_teachers(",".join(f"{name}=local-dir:{folders[name]}" for name in names))
    return {spec.slug: load_teacher(spec, describe_teacher(spec), torch.device("cpu")) for spec in specs}


def run(corpus: Path, root: Path, teachers: dict[str, Teacher], threads: int = 2) -> FeatureStore:
    """Index when new, then do what is left, as the scheduler would."""
    if not (root / "zarr.json").exists():
        create_indexed_store(open_corpus(str(corpus)), root)
    store = FeatureStore.open(root)
    for teacher in teachers.values():
        add_teacher(store, teacher.card)
    for task in plan_tasks(store.record, [teacher.card for teacher in teachers.values()], store.ledger):
        bench = Workbench(Threads(threads))
        extract_shard(store, task.shard, {slug: teachers[slug] for slug in task.teachers}, bench)
    return FeatureStore.open(root)


def extracted(table: Path, root: Path, teachers: dict[str, Teacher], recipe: Recipe, threads: int = 2) -> FeatureStore:
    """What `mmkd extract --views` does, without a scheduler."""
    if not (root / "zarr.json").exists():
        create_indexed_store(open_corpus(str(table)), root)
    append_pictures(Store.open(root), recipe, lambda line: None)
    return run(table, root, teachers, threads)


def tree_digest(root: Path) -> dict[str, str]:
    """SHA-256 of every file but the run logs and the root group, which holds the time of creation."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] != "runs" and path != root / "zarr.json"
    }
