"""Check of a suite before it runs: rows, classes, events, groups, prompts and features."""

import contextlib
import json
import re
import shlex
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mmkd.base.errors import NotAStoreError, UserError, collect
from mmkd.base.text import cell_text, one_line
from mmkd.evaluate.dataset import SPLITS, DatasetRows, load_dataset, value_counts, value_name
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.fetch import source_place
from mmkd.evaluate.plan import model_names, open_stores
from mmkd.evaluate.splits import subgroups_of
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.tasks import TASKS
from mmkd.store import MmkdError
from mmkd.store.evaluation_rows import read_prompts
from mmkd.store.layout import TOWERS, Tower

WRITTEN_NULLS = ("nan", "nat", "na", "<na>", "n/a", "none", "null", "missing", "unknown", "not available", "-", "?")
"""What tables write for no value, in lower case. It is text to us, so that all these rows would be one group."""


@dataclass(frozen=True)
class DatasetCheck:
    """Findings about one data set. rows, groups: per split. counts: titles such as `test rows by class` to values and
    their counts. missing: for each model, rows without features per split. problems: reasons that keep units from
    running. warnings: reasons to doubt their scores. steps: commands for a set that is not extracted yet."""

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

    def lines(self) -> list[str]:
        counts = ", ".join(f"{split} {n} ({self.groups[split]} groups)" for split, n in self.rows.items())
        counts = counts or ("not extracted" if self.steps else "not readable")
        lines = [f"{self.dataset} [{self.role}, {self.modality}: {', '.join(self.tasks)}]: {counts}"]
        for title, found in self.counts.items():
            lines.append(f"  {title}: " + ", ".join(f"{name} {n}" for name, n in found.items()))
        for model, splits in self.missing.items():
            lines.append(f"  {model}: no features for " + ", ".join(f"{n} {split} rows" for split, n in splits.items()))
        if self.layout == "unconfirmed":
            lines.append("  layout: unconfirmed; compare file names and columns")
        for word, texts in (("warning", self.warnings), ("problem", self.problems), ("next", self.steps)):
            lines += [f"  {word}: {text}" for text in texts]
        return lines


@dataclass(frozen=True)
class CheckReport:
    """All data sets of a suite, and the models that would run."""

    suite: str
    models: tuple[str, ...]
    datasets: tuple[DatasetCheck, ...]

    @property
    def ok(self) -> bool:
        return not any(one.problems for one in self.datasets)

    def text(self) -> str:
        ready = sum(bool(one.rows) and not one.problems for one in self.datasets)
        head = f"suite {self.suite}: {ready} of {len(self.datasets)} data sets ready, models "
        lines = [head + (", ".join(self.models) or "none"), *(line for one in self.datasets for line in one.lines())]
        return "\n".join(map(one_line, lines))

    def json(self) -> str:
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=1)


def check_suite(suite: Suite) -> CheckReport:
    """Check rows, classes, prompts, splits and features of every data set and model. Raises ConfigError if the suite
    names a metric that does not exist, or an ensemble like an encoder."""
    stores, unopened = open_stores(suite)
    models = model_names(suite, list(stores.values()))
    checks = []
    for spec in suite.datasets:
        found = DatasetCheck(spec.dataset, spec.role, spec.modality, spec.tasks, spec.about.layout)
        for name in spec.tasks:
            TASKS[name].scoring(spec)
        if spec.store in stores:
            with collect(found.problems):
                _check_dataset(suite, load_dataset(spec, stores[spec.store]), models, found)
        elif spec.source is not None and isinstance(unopened[spec.store], NotAStoreError):
            _check_source(spec, spec.source, found)
        else:
            found.problems.append(str(unopened[spec.store]))
        checks.append(found)
    return CheckReport(suite.suite, models, tuple(checks))


def _check_dataset(suite: Suite, data: DatasetRows, models: tuple[str, ...], found: DatasetCheck) -> None:
    spec = data.spec
    for name, samples in data.splits.items():
        found.rows[name] = len(samples)
        found.groups[name] = len(set(data.groups(samples).tolist()))
        if spec.label is not None:
            index = data.class_of
            labels = Counter(
                data.classes[index[value]] if value in index else f"{value_name(value)} (no class)"
                for value in samples.column(spec.label).tolist()
            )
            found.counts[f"{name} rows by class"] = dict.fromkeys(data.classes, 0) | dict(labels)
    for name in spec.tasks:
        task = TASKS[name]
        reasons: list[str] = []
        with collect(reasons):
            reasons += task.problems(data)
        found.problems.extend(text for text in reasons if text not in found.problems)
        with contextlib.suppress(UserError):  # `problems` names the reason
            found.counts.update(task.counts(data))
    with collect(found.problems):
        for name, values in subgroups_of(data, data.splits["test"].column).items():
            found.counts[f"test rows by {name}"] = {key or "blank": n for key, n in sorted(Counter(values).items())}
    found.warnings.extend(_blank_cells(data) + _same_images(data) + _similar_groups(data) + _similar_filters(data))
    slides = (spec.source or {}).get("kind") == "slides"
    sizes, unit = (found.groups, "groups") if slides else (found.rows, "rows")
    sizes = sizes | {"all": sum(sizes.values())}
    found.warnings.extend(
        f"{split} has {sizes[split]} {unit}, published are {count}"
        for split, count in spec.about.expected.items()
        if count is not None and sizes.get(split, count) != count
    )
    with collect(found.problems):
        _check_prompts(data)
    for model in models:
        with collect(found.problems):
            _check_features(data, Features(data.store, model, suite.ensembles.get(model, ())), found)


def _blank_cells(data: DatasetRows) -> list[str]:
    """Count rows without a group, bag or domain, and those whose cell is a word for no value."""
    spec, found = data.spec, []
    meanings = {spec.domain: f"they count under {spec.dataset!r}", spec.bag: "each is a bag of its own"}
    meanings[spec.group] = "each is a group of its own"
    for split, samples in data.splits.items():
        for column, meaning in meanings.items():
            cells = [] if column is None else samples.column(column).tolist()
            if blank := cells.count(None):
                found.append(f"{blank} {split} rows have no {column}; {meaning}")
            if words := [cell for cell in cells if cell is not None and cell.casefold() in WRITTEN_NULLS]:
                found.append(
                    f"{column} of the {split} rows is {value_counts(words)}, a value like any other; leave the cell "
                    "blank where there is none"
                )
    return found


def _folded(text: str) -> str:
    """`text` without case, encoding of accents, invisible characters, separators, and zeros before a number."""
    letters = unicodedata.normalize("NFKC", text).casefold()
    visible = "".join(letter for letter in letters if unicodedata.category(letter) != "Cf")
    return cell_text(re.sub(r"(?<![\d.])0+(?=\d)", "", re.sub(r"[\s_-]+", " ", visible).strip())) or ""


def _similar_groups(data: DatasetRows) -> list[str]:
    """Report groups of two splits whose names differ in spelling only."""
    if data.spec.group is None:
        return []
    spellings: dict[str, dict[str, str]] = {}
    for split, samples in data.splits.items():
        for group in dict.fromkeys(data.groups(samples).tolist()):
            spellings.setdefault(_folded(group), {}).setdefault(group, split)
    if not (pairs := [names for names in spellings.values() if len(set(names.values())) > 1]):
        return []
    shown = " and ".join(f"{group!r} in {split}" for group, split in list(pairs[0].items())[:2])
    return [f"{len(pairs)} values of {data.spec.group} may be one group in two splits: {shown}; write them alike"]


def _similar_filters(data: DatasetRows) -> list[str]:
    """Report values that no split's filter names, and that differ from one that does in spelling only."""
    found = []
    filters = [chosen for split in SPLITS if (chosen := getattr(data.spec.rows, split)) is not None]
    for column, counts in data.values.items():
        named = {value for chosen in filters for value in chosen.get(column, ())}
        similar = {_folded(value): value for value in named if value}
        texts = {raw: cell_text(raw) or "" for raw in counts}
        if other := {raw: counts[raw] for raw, text in texts.items() if text not in named and _folded(text) in similar}:
            like = ", ".join(sorted({repr(similar[_folded(texts[raw])]) for raw in other}))
            found.append(f"rows with {column} {value_counts(Counter(other))} are in no split; `rows` names {like}")
    return found


def _check_features(data: DatasetRows, features: Features, found: DatasetCheck) -> None:
    towers: set[Tower] = {tower for task in data.spec.tasks for tower in TASKS[task].towers(data.spec)}
    needed = [(samples, tower) for tower in TOWERS if tower in towers for samples in data.splits.values()]
    needed += [(samples, "text") for samples in data.texts.values() if len(samples)]
    missing = {}
    for samples, tower in needed:
        if lacking := set(features.members) - set(data.store.having(features.members, tower)):
            found.problems.append(f"{sorted(lacking)[0]} has no {tower} tower, which the tasks read; leave it out")
            break
        there = features.sound(tower, samples.rows)
        if not there.all():
            missing[samples.name] = int((~there).sum())
        if len(samples) and not there.any():
            found.problems.append(
                f"{features.model} has no {tower} features for any {samples.name} row; extract it first"
            )
    if missing:
        found.missing[features.model] = missing


def _same_images(data: DatasetRows) -> list[str]:
    """Report exact copies of test images among training images, which inflate a probe's score."""
    images = {name: set(samples.column("image_sha256")) - {None} for name, samples in data.splits.items()}
    shared = {name: len(images["test"] & images.get(name, set())) for name in ("train", "val")}
    return [f"{count} test images are byte for byte also {name} images" for name, count in shared.items() if count]


def _check_source(spec: DatasetSpec, source: dict[str, object], found: DatasetCheck) -> None:
    places = f"{shlex.quote(spec.described_in)} {shlex.quote(spec.store)}"
    bags = source.get("kind") == "bags"
    found.steps.append(f"mmkd store import {places} --name MODEL" if bags else f"mmkd extract {places} --teachers ...")
    try:
        place = source_place(source, spec.dataset, Path(spec.described_in))
        there = place.exists()
    except (MmkdError, OSError) as error:
        found.problems.append(str(error))
        return
    if there:
        found.problems.append(f"not extracted: {spec.store} does not exist")
        return
    about = spec.about
    terms = "; ".join(part for part in (about.access, about.licence and f"licence: {about.licence}") if part)
    owners = f"{about.homepage or 'its owners'}{f' ({terms})' if terms else ''}"
    found.problems.append(f"its files are not here: {place!s} does not exist")
    command = f"; mmkd evaluate fetch {shlex.quote(spec.described_in)} {'does' if about.fetch.files else 'says how'}"
    helps = command if about.fetch.files or about.fetch.steps else ""
    found.steps.insert(0, f"get it from {owners}, or say where it is in roots.yaml{helps}")


def _check_prompts(data: DatasetRows) -> None:
    """Raise UserError if the prompt file changed since extraction."""
    prompts = data.spec.prompts
    if prompts is None or prompts.file is None:
        return
    stored = [samples for name, samples in data.texts.items() if name in ("prompt", "negative prompt")]
    extracted = Counter(text for samples in stored for text in zip(samples.ids, samples.column("caption"), strict=True))
    written = Counter((prompt.key, prompt.text) for prompt in read_prompts(Path(prompts.file)).prompts())
    for key, text in (written - extracted) or (extracted - written):
        raise UserError(
            f"{prompts.file} is not what was extracted into {data.spec.store}: {key} is {text!r} in one of them only; "
            "extract the set into a new store"
        )
