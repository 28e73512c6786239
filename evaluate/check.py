"""Check of a suite before it runs: rows, classes, events, groups, prompts and features."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mmkd.base.errors import NotAStoreError, UserError
from mmkd.base.text import one_line
from mmkd.evaluate.dataset import DatasetRows, Samples, load_dataset
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.fetch import source_place
from mmkd.evaluate.plan import model_names
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.tasks import TASKS
from mmkd.store import FeatureStore, MmkdError
from mmkd.store.evaluation_rows import read_prompts
from mmkd.store.layout import SOUND_BIT, TOWERS, Tower


@dataclass(frozen=True)
class DatasetCheck:
    """Findings about one data set. layout: as the description has it. rows, groups: per split. counts: titles such as
    `test rows by diagnosis` to values and their counts. missing: for each model, rows without features per split.
    problems: reasons that keep units from running. warnings: reasons to doubt their scores. steps: commands for a set
    that is not extracted yet, in order."""

    dataset: str
    role: str
    modality: str = ""
    tasks: tuple[str, ...] = ()
    layout: str | None = None
    rows: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)

    @property
    def readable(self) -> bool:
        """True if its store has the columns that the suite names."""
        return bool(self.rows)

    @property
    def counted(self) -> str:
        """Count rows and groups of each split; a reason where there are none."""
        counts = ", ".join(f"{split} {n} ({self.groups[split]} groups)" for split, n in self.rows.items())
        return counts or ("not extracted" if self.steps else "not readable")


@dataclass(frozen=True)
class CheckReport:
    """All data sets of a suite, and the models that would run."""

    suite: str
    models: tuple[str, ...]
    datasets: tuple[DatasetCheck, ...]

    @property
    def ok(self) -> bool:
        """True if every unit can run."""
        return not any(one.problems for one in self.datasets)

    def text(self) -> str:
        """Return one paragraph per data set."""
        ready = sum(one.readable and not one.problems for one in self.datasets)
        lines = [
            f"suite {self.suite}: {ready} of {len(self.datasets)} data sets ready, "
            f"models {', '.join(self.models) or 'none'}"
        ]
        for one in self.datasets:
            lines.append(f"{one.dataset} [{one.role}, {one.modality}: {', '.join(one.tasks)}]: {one.counted}")
            for title, counts in one.counts.items():
                lines.append(f"  {title}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
            for model, splits in one.missing.items():
                lines.append(f"  {model}: no features for " + ", ".join(f"{n} {s} rows" for s, n in splits.items()))
            if one.layout == "unconfirmed":
                lines.append("  layout: unconfirmed, no source for its file names and columns; compare them with yours")
            lines += [f"  warning: {text}" for text in one.warnings]
            lines += [f"  problem: {text}" for text in one.problems]
            lines += [f"  next: {text}" for text in one.steps]
        return "\n".join(map(one_line, lines))

    def json(self) -> str:
        """Return the same as JSON."""
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=1)


def check_suite(suite: Suite) -> CheckReport:
    """Check rows, classes, prompts, splits and features of every data set and model. Raises ConfigError if the suite
    names a metric that does not exist, or an ensemble like an encoder."""
    stores: dict[str, FeatureStore] = {}
    unopened: dict[str, MmkdError] = {}
    for path in dict.fromkeys(spec.store for spec in suite.datasets):
        try:
            stores[path] = FeatureStore.open(path)
        except MmkdError as error:
            unopened[path] = error
    models = model_names(suite, list(stores.values()))
    checks = []
    for spec in suite.datasets:
        found = DatasetCheck(spec.dataset, spec.role, spec.modality, spec.tasks, spec.about.layout)
        if spec.store not in unopened:
            _check_dataset(suite, spec, stores[spec.store], models, found)
        elif spec.source is not None and isinstance(unopened[spec.store], NotAStoreError):
            missing = _missing_before(spec)
            found.problems.append(missing.problem)
            found.steps.extend(missing.steps)
        else:
            found.problems.append(str(unopened[spec.store]))
        checks.append(found)
    return CheckReport(suite.suite, models, tuple(checks))


def _check_dataset(
    suite: Suite, spec: DatasetSpec, store: FeatureStore, models: tuple[str, ...], found: DatasetCheck
) -> None:
    """Fill in findings about a data set from its store."""
    try:
        data = load_dataset(spec, store)
    except MmkdError as error:
        found.problems.append(str(error))
        return
    for name, samples in data.splits.items():
        found.rows[name] = len(samples)
        found.groups[name] = len(set(data.groups(samples).tolist()))
        if spec.label is not None:
            found.counts[f"{name} rows by class"] = _class_counts(data, spec.label, samples)
        if spec.group is not None and (single := sum(value is None for value in samples.column(spec.group))):
            found.warnings.append(f"{single} {name} rows have no {spec.group}; each is a group of its own")
        if samples.unmatched:
            found.problems.append(f"{spec.dataset}: {samples.unmatched}")
    for name in spec.tasks:
        task = TASKS[name]
        task.scoring(spec)
        found.problems.extend(text for text in task.problems(data) if text not in found.problems)
        with contextlib.suppress(UserError):  # `problems` names the reason
            found.counts.update(task.counts(data))
    found.warnings.extend(_same_images(data) + _similar_groups(data))
    found.warnings.extend(_differs_from_published(spec, found))
    found.problems.extend(_prompts_differ(data))
    for model in models:
        _check_model(data, model, suite.ensembles.get(model, ()), found)


def _class_counts(data: DatasetRows, label: str, samples: Samples) -> dict[str, int]:
    """Count rows of every class and of every value that is not a class."""
    values = data.spec.classes or {name: (name,) for name in data.classes}
    name_of = {value: name for name in data.classes for value in values[name]}
    counts = Counter(
        name_of.get(value, f"{'blank' if value is None else repr(value)} (no class)")
        for value in samples.column(label).tolist()
    )
    return {name: counts[name] for name in data.classes} | dict(counts)


def _similar_groups(data: DatasetRows) -> list[str]:
    """Return groups of two splits whose names differ in case or in zeros at the beginning only."""
    if data.spec.group is None:
        return []
    spellings: dict[str, dict[str, str]] = {}
    for split, samples in data.splits.items():
        for group in dict.fromkeys(data.groups(samples).tolist()):
            folded = re.sub(r"(?<!\d)0+(?=\d)", "", unicodedata.normalize("NFKC", group).casefold())
            spellings.setdefault(re.sub(r"\s+", " ", folded), {}).setdefault(group, split)
    pairs = [names for names in spellings.values() if len(set(names.values())) > 1]
    if not pairs:
        return []
    shown = " and ".join(f"{group!r} in {split}" for group, split in list(pairs[0].items())[:2])
    return [f"{len(pairs)} values of {data.spec.group} may be one group in two splits: {shown}; write them alike"]


def _check_model(data: DatasetRows, model: str, members: tuple[str, ...], found: DatasetCheck) -> None:
    try:
        features = Features(data.store, model, members)
    except MmkdError as error:
        found.problems.append(str(error))
        return
    towers: set[Tower] = {tower for task in data.spec.tasks for tower in TASKS[task].towers(data.spec)}
    needed = [(samples, tower) for tower in TOWERS if tower in towers for samples in data.splits.values()]
    needed += [(samples, "text") for samples in (data.prompts, data.negatives, *data.texts.values()) if samples]
    missing = {}
    for samples, tower in needed:
        there = np.ones(len(samples), dtype=bool)
        for slug in features.members:
            there &= (data.store.valid(slug)[samples.rows] & SOUND_BIT[tower]) != 0
        if not there.all():
            missing[samples.name] = int((~there).sum())
        if len(samples) and not there.any():
            found.problems.append(f"{model} has no {tower} features for any {samples.name} row; extract it first")
    if missing:
        found.missing[model] = missing


def _same_images(data: DatasetRows) -> list[str]:
    """Report exact copies of test images among training images, which inflate a probe's score."""
    test = {digest for digest in data.splits["test"].column("image_sha256") if digest is not None}
    found = []
    for name in ("train", "val"):
        if name in data.splits:
            shared = test & set(data.splits[name].column("image_sha256").tolist())
            if shared:
                found.append(f"{len(shared)} test images are byte for byte also {name} images")
    return found


@dataclass(frozen=True)
class _Missing:
    """Reason a data set cannot be scored, with the commands to run in order."""

    problem: str
    steps: tuple[str, ...]


def _missing_before(spec: DatasetSpec) -> _Missing:
    """Return the part that a data set without a store lacks: its files, or only their extraction."""
    assert spec.source is not None, "asked of sets that are described"
    places = f"{shlex.quote(spec.described_in)} {shlex.quote(spec.store)}"
    bags = spec.source.get("kind") == "bags"
    extraction = f"mmkd store import {places} --name MODEL" if bags else f"mmkd extract {places} --teachers ..."
    try:
        place = source_place(spec.source, spec.dataset, Path(spec.described_in))
        there = place.exists()
    except (MmkdError, OSError) as error:
        return _Missing(str(error), (extraction,))
    if there:
        return _Missing(f"not extracted: {spec.store} does not exist", (extraction,))
    about = spec.about
    terms = "; ".join(part for part in (about.access, about.licence and f"licence: {about.licence}") if part)
    owners = about.homepage or "its owners"
    get = f"get it from {owners}{f' ({terms})' if terms else ''}, or say where it is in roots.yaml"
    if about.fetch.files or about.fetch.steps:
        get += f"; mmkd evaluate fetch {shlex.quote(spec.described_in)} {'does' if about.fetch.files else 'says how'}"
    return _Missing(f"its files are not here: {place!s} does not exist", (get, extraction))


def _differs_from_published(spec: DatasetSpec, found: DatasetCheck) -> list[str]:
    """Return splits with another number of samples than was published; slides are counted by group."""
    slides = spec.source is not None and spec.source.get("kind") == "slides"
    counts, unit = (found.groups, "groups") if slides else (found.rows, "rows")
    counts = counts | {"all": sum(counts.values())}
    return [
        f"{split} has {counts[split]} {unit}, published are {count}"
        for split, count in spec.about.expected.items()
        if count is not None and split in counts and counts[split] != count
    ]


def _prompts_differ(data: DatasetRows) -> list[str]:
    """Return a problem if the prompt file changed since extraction."""
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
