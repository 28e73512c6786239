"""Results of several labs as one folder, which tables, comparisons and pages read like any other."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.base.errors import ConfigError, CorruptStoreError
from mmkd.base.files import write_atomically
from mmkd.base.text import counted
from mmkd.evaluate.plan import Plan, plan_path, read_plan
from mmkd.evaluate.predictions import read_predictions
from mmkd.evaluate.results import ResultRow, append_results, read_results
from mmkd.evaluate.suite import Suite, differing_keys
from mmkd.evaluate.task import Unit
from mmkd.evaluate.trust import SCHEMA, VERSION

TRUST = "trust"
"""Folder of the files of `mmkd evaluate trust`."""


@dataclass(frozen=True)
class Merged:
    out: Path
    models: tuple[str, ...]
    units: int

    def __str__(self) -> str:
        return f"{counted(self.units, 'unit')} of {counted(len(self.models), 'model')} in {self.out}"


def merge_results(out: Path, folders: Sequence[Path], suite: str | None = None) -> Merged:
    """Put the last run of a suite in each of the folders into the new folder `out`: plan, result lines and predictions,
    and the files of `trust`. Raises ConfigError, which names what differs, unless suites (but for places, models and
    notes) and data are the same, each model has one set of features, and `out` is new; CorruptStoreError for
    predictions that cannot be read. Of a unit that failed in one lab the answer of the other counts."""
    if len(folders) < 2:
        raise ConfigError(f"name two or more folders of results to merge, got {len(folders)}")
    if out.exists():
        raise ConfigError(f"{out} exists; name a new folder for the merged results")
    plans = [read_plan(folder, suite) for folder in folders]
    results = [read_results(folder) for folder in folders]
    for folder, plan in zip(folders[1:], plans[1:], strict=True):
        if differing := differing_keys(plans[0].suite, plan.suite):
            raise ConfigError(
                f"{folders[0]} and {folder} are of unlike suites ({plans[0].suite.digest}, {plan.suite.digest}): "
                f"{', '.join(differing)}; run one suite in both labs"
            )
    _check_units(folders, plans)
    trust = _merged_trust(folders)
    chosen: dict[tuple[Any, ...], tuple[Unit, Path, list[ResultRow]]] = {}
    for folder, plan, found in zip(folders, plans, results, strict=True):
        for unit in plan.units:
            what = (unit.dataset, unit.task, unit.model, unit.variant)
            rows = found.get(unit.key, [])
            if what not in chosen or (_answered(rows) and not _answered(chosen[what][2])):
                chosen[what] = (unit, folder, rows)
    plan = plans[0].model_copy(
        update={
            "suite": _joined_suite(plans),
            "models": tuple(dict.fromkeys(model for one in plans for model in one.models)),
            "units": tuple(unit for unit, _, _ in chosen.values()),
            "absent": tuple(name for name in plans[0].absent if all(name in one.absent for one in plans)),
        }
    )
    for _, folder, rows in chosen.values():
        if _answered(rows):
            read_predictions(folder / rows[0].predictions)
            write_atomically(out / rows[0].predictions, (folder / rows[0].predictions).read_bytes())
    append_results(out, [row for _, _, rows in chosen.values() for row in rows])
    for name, content in trust.items():
        write_atomically(out / TRUST / name, (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(plan_path(out, plan.suite.suite), (plan.model_dump_json(indent=1) + "\n").encode())
    return Merged(out, plan.models, len(chosen))


def _answered(rows: list[ResultRow]) -> bool:
    return bool(rows) and rows[0].status != "failed"


def _check_units(folders: Sequence[Path], plans: Sequence[Plan]) -> None:
    """Raise ConfigError if a data set has other rows in two folders, or a model other features."""
    first: dict[tuple[str, ...], tuple[str, Path]] = {}
    for folder, plan in zip(folders, plans, strict=True):
        for unit in (one for one in plan.units if one.data_digest):
            data, features = (
                f"{unit.dataset} has other rows or labels",
                f"{unit.model} has other features of {unit.dataset}",
            )
            for what, own, how, place in (
                (data, unit.data_digest, "extract the same files in both labs", (unit.dataset,)),
                (features, unit.features_digest, "rename one of the two models", (unit.dataset, unit.model)),
            ):
                digest, other = first.setdefault(place, (own, folder))
                if digest != own:
                    raise ConfigError(f"{what} in {folder} ({own}) than in {other} ({digest}); {how}")


def _joined_suite(plans: Sequence[Plan]) -> Suite:
    """The first suite with the models and ensembles of all."""
    named = [plan.suite.models for plan in plans]
    models = None if None in named else tuple(dict.fromkeys(model for one in named for model in one or ()))
    ensembles: dict[str, tuple[str, ...]] = {}
    for plan in plans:
        ensembles |= plan.suite.ensembles
    return plans[0].suite.model_copy(update={"models": models, "ensembles": ensembles})


def read_trust(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the files of `mmkd evaluate trust` below a folder of results, by file name. Raises CorruptStoreError for
    another file."""
    found = {}
    for path in sorted((folder / TRUST).glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            known = (content["schema"], content["version"]) == (SCHEMA, VERSION)
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise CorruptStoreError(f"{path} is not a file of `mmkd evaluate trust` of this version; move it away")
        found[path.name] = content
    return found


def _merged_trust(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Join the models of files about one data set. Raises ConfigError if anything else in them differs."""
    free = {"models", "remarks", "code_version", "code_digest"}
    merged: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for name, content in read_trust(folder).items():
            first = merged.setdefault(name, content | {"models": []})
            for key in sorted(set(first) - free):
                if first[key] != content[key]:
                    both = f"{key} {content[key]!r}, another folder {first[key]!r}"
                    how = " with --k" if key == "k" else ""
                    raise ConfigError(f"{TRUST}/{name} of {folder} has {both}; measure both alike{how}")
            there = {one["model"] for one in first["models"]}
            first["models"] += [one for one in content["models"] if one["model"] not in there]
    return merged
