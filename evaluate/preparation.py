"""Steps from a published data set to its scores: download, extraction, comparison of the store with the description."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from mmkd.base.config import filled, user_roots
from mmkd.base.errors import MmkdError
from mmkd.base.places.remote import as_root
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.store.evaluation_rows import read_prompts


@dataclass(frozen=True)
class Missing:
    """Why a data set cannot be scored, and what to do, in order."""

    problem: str
    steps: tuple[str, ...]


def missing_before(spec: DatasetSpec) -> Missing:
    """The part that a data set without a store lacks: its files, or only their extraction."""
    assert spec.source is not None, "asked of sets that are described"
    places = f"{shlex.quote(spec.described_in)} {shlex.quote(spec.store)}"
    bags = spec.source.get("kind") == "bags"
    extraction = f"mmkd store import {places} --name MODEL" if bags else f"mmkd extract {places} --teachers ..."
    try:
        path = str(filled(spec.source.get("path", ""), user_roots() | {"dataset": spec.dataset}, spec.described_in))
        place = as_root(path if "://" in path else str(Path(spec.described_in).parent / path))
        there = place.exists()
    except (MmkdError, OSError) as error:
        return Missing(str(error), (extraction,))
    if there:
        return Missing(f"not extracted: {spec.store} does not exist", (extraction,))
    about = spec.about
    terms = "; ".join(part for part in (about.access, about.licence and f"licence: {about.licence}") if part)
    owners = about.homepage or "its owners"
    get = f"get it from {owners}{f' ({terms})' if terms else ''}, or say where it is in roots.yaml"
    return Missing(f"its files are not here: {place!s} does not exist", (get, extraction))


def differs_from_published(spec: DatasetSpec, rows: dict[str, int]) -> list[str]:
    """Splits with another number of samples than was published."""
    return [
        f"{split} has {rows[split]} rows, published are {count}"
        for split, count in spec.about.expected.items()
        if count is not None and split in rows and rows[split] != count
    ]


def prompts_differ(data: DatasetRows) -> list[str]:
    """A problem where the prompt file is not what was extracted."""
    prompts = data.spec.prompts
    if prompts is None or prompts.file is None or data.prompts is None:
        return []
    try:
        file = read_prompts(Path(prompts.file))
    except MmkdError as error:
        return [str(error)]
    stored = [one for one in (data.prompts, data.negatives) if one is not None]
    extracted = Counter(text for samples in stored for text in zip(samples.ids, samples.column("caption"), strict=True))
    written = Counter((prompt.key, prompt.text) for prompt in file.prompts())
    if extracted == written:
        return []
    first = next(iter((written - extracted) or (extracted - written)))
    return [
        f"{prompts.file} is not what was extracted into {data.spec.store}: {first[0]} is {first[1]!r} in one of them "
        "only; extract the set into a new store"
    ]
