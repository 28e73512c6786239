"""Running a suite: what is done is skipped, what fails is recorded, and nothing stops the rest."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmkd.evaluate.plan import Loaded, PlannedUnit, make_plan, resample_name, write_plan
from mmkd.evaluate.predictions import Predictions, write_predictions
from mmkd.evaluate.results import ResultRow, append_results, code_digest, number, read_results
from mmkd.evaluate.scoring import resampled
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Unit
from mmkd.evaluate.tasks import TASKS
from mmkd.store import MmkdError
from mmkd.store.errors import ConfigError


@dataclass(frozen=True)
class Outcome:
    """What became of one unit."""

    unit: Unit
    status: str
    """`ran`, `done` (earlier) or `failed`."""
    reason: str = ""
    other_code: bool = False
    """Done by sources of mmkd.evaluate that are not those of now."""


@dataclass(frozen=True)
class RunReport:
    """What became of all units of a run."""

    out: Path
    outcomes: tuple[Outcome, ...]
    absent: tuple[str, ...] = ()
    """Data sets of the suite that nothing was extracted of."""

    def count(self, status: str) -> int:
        """Units of this status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Units without a result, with their reasons."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def __str__(self) -> str:
        text = (
            f"{len(self.outcomes)} units: {self.count('ran')} run, {self.count('done')} done before, "
            f"{len(self.failed)} failed; results in {self.out}"
        )
        others = sum(outcome.other_code for outcome in self.outcomes)
        if others:
            text += f"; {others} of those done before come from another version of the code, --force runs them again"
        if self.absent:
            text += f"\n{len(self.absent)} data sets are not extracted: {', '.join(self.absent)}; `check` says how"
        return text


def run_suite(
    suite: Suite,
    out: Path,
    *,
    selection: bool = False,
    force: bool = False,
    progress: Callable[[Outcome, int], None] | None = None,
) -> RunReport:
    """Run what is missing of a suite.

    Writes `plan.json`, `results.jsonl` (append-only) and `predictions/` into `out`. A unit whose features,
    rows and settings are those of a stored result is not run again; failed units are.

    Args:
        suite: what to run.
        out: folder of the results.
        selection: the scores will be used to choose a model: suites with `role: report` sets are refused.
        force: run finished units again; their new rows count.
        progress: called after every unit with its outcome and the number of all units.

    Raises:
        ConfigError: the suite contradicts itself, or `selection` with report sets.
        StoreError: a store cannot be opened, or results cannot be written.
    """
    if selection:
        _refuse_report_sets(suite)
    loaded = make_plan(suite)
    write_plan(out, loaded.plan)
    finished = {} if force else _finished(out)
    outcomes: list[Outcome] = []
    for planned in loaded.plan.units:
        if planned.key in finished:
            outcomes.append(Outcome(planned.unit, "done", other_code=finished[planned.key] != code_digest()))
        else:
            outcomes.append(_run_unit(loaded, planned, out))
        if progress is not None:
            progress(outcomes[-1], len(loaded.plan.units))
    return RunReport(out, tuple(outcomes), loaded.plan.absent)


def _refuse_report_sets(suite: Suite) -> None:
    reported = [spec.dataset for spec in suite.datasets if spec.role == "report"]
    if reported:
        raise ConfigError(
            f"suite {suite.suite!r} is to choose a model, but {reported[0]!r} has role `report`: a score on it would "
            "no longer be honest; choose on sets with `role: monitor`"
        )


def _finished(out: Path) -> dict[str, str]:
    """Keys of units that have a result and their predictions, with the digest of the code that made them."""
    return {
        key: rows[0].code_digest
        for key, rows in read_results(out).items()
        if rows[0].status != "failed" and (out / rows[0].predictions).is_file()
    }


def _run_unit(loaded: Loaded, planned: PlannedUnit, out: Path) -> Outcome:
    started = time.perf_counter()
    predictions: Predictions | None = None
    rows: list[ResultRow] = []
    reason = planned.reason
    if not reason:
        try:
            predictions = _predict(loaded, planned)
            rows = _score(loaded, planned, predictions, time.perf_counter() - started)
        except MmkdError as error:
            reason = str(error)
        except (ValueError, ArithmeticError, MemoryError) as error:  # numerics that this unit's data break
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if reason or predictions is None:
        append_results(out, [_row(loaded, planned, status="failed", reason=reason)])
        return Outcome(planned.unit, "failed", reason)
    write_predictions(out / planned.predictions, predictions)
    append_results(out, rows)
    return Outcome(planned.unit, "ran")


def _predict(loaded: Loaded, planned: PlannedUnit) -> Predictions:
    data = loaded.data[planned.dataset]
    features = loaded.features[planned.dataset, planned.model]
    predictions = TASKS[planned.task].predict(planned.unit.variant, data, features)
    if not predictions.available.any():
        raise MmkdError(f"{planned.model} has features for none of the {len(predictions)} test samples")
    return predictions


def _score(loaded: Loaded, planned: PlannedUnit, predictions: Predictions, seconds: float) -> list[ResultRow]:
    suite = loaded.plan.suite
    scoring = TASKS[planned.task].scoring(suite.dataset(planned.dataset).settings)
    name = resample_name(suite, planned.dataset)
    every_row = {"": np.ones(len(predictions), dtype=bool)}
    found = resampled(predictions, scoring.metrics, scoring, (suite.bootstrap, name), every_row)
    rows = []
    for (_, metric), replicates in found.items():
        low, high = replicates.interval(suite.bootstrap.level)
        undefined = replicates.value != replicates.value
        rows.append(
            _row(
                loaded,
                planned,
                metric=metric,
                value=number(replicates.value),
                ci_low=number(low),
                ci_high=number(high),
                n=replicates.n,
                n_missing=replicates.missing,
                n_groups=replicates.groups,
                n_boot=len(replicates.draws),
                status="undefined" if undefined else "ok",
                reason=f"{metric} has no value on these labels" if undefined else "",
                predictions=planned.predictions,
                seconds=round(seconds, 4),
            )
        )
    return rows


def _row(loaded: Loaded, planned: PlannedUnit, **found: object) -> ResultRow:
    """A result row: the unit's identity, and what was found."""
    suite = loaded.plan.suite
    spec = suite.dataset(planned.dataset)
    nothing = {
        "metric": "", "value": None, "ci_low": None, "ci_high": None, "n": 0, "n_missing": 0, "n_groups": 0,
        "n_boot": 0, "predictions": "", "seconds": 0.0,
    }  # fmt: skip
    identity = {
        "suite": suite.suite,
        "suite_version": suite.version,
        "dataset_version": spec.version,
        "modality": spec.modality,
        "role": spec.role,
        "protocol": TASKS[planned.task].scoring(spec.settings).protocol,
        "boot_seed": suite.bootstrap.seed,
        "code_version": importlib.metadata.version("mmkd"),
        "code_digest": code_digest(),
    }
    return ResultRow.model_validate(nothing | planned.model_dump() | identity | found)
