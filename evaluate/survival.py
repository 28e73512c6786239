"""Survival prediction from bags of features, cross-validated by patients and scored by Harrell's concordance."""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mmkd.base.arrays import Bools, Floats
from mmkd.base.errors import UserError
from mmkd.evaluate.dataset import DatasetRows
from mmkd.evaluate.dataset_spec import DatasetSpec, RowFilter, Section, side_faults
from mmkd.evaluate.features import BagFeatures, Bags, Features, make_bags
from mmkd.evaluate.heads.coxnet import Cohort, CoxnetSettings, fit_coxnet
from mmkd.evaluate.heads.settings import MilSettings, Trained, budget_warnings
from mmkd.evaluate.measured import alive_at
from mmkd.evaluate.metrics import concordance
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.scoring import Metric, Scoring
from mmkd.evaluate.splits import Round, answers, folded_resamples, folds_of, mean_over_folds, rounds
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_bags
from mmkd.store.layout import Tower

COLUMNS = ("risk", "time", "event")


class SurvivalSettings(TaskSettings):
    """Survival from bags of features, cross-validated by patients."""

    heads: tuple[Literal["coxnet", "abmil_cox", "abmil_nll"], ...] = ("coxnet", "abmil_cox", "abmil_nll")
    tower: Literal["image", "text"] = "image"
    """Features that describe a patient; `text` for clinical notes or reports in the caption column."""
    normalized: bool = False
    """Scale every vector to unit length before pooling. Cox regression standardizes columns and networks the whole, so
    that scale does not matter to them, while the length of a vector may carry risk."""
    folds: int = Field(default=5, ge=2)
    seeds: int = Field(default=5, ge=1)
    """Draws of the folds (published folds stay) and of the heads' first weights."""
    bins: int = Field(default=4, ge=2)
    """Time bins of `abmil_nll`: quantiles of the training patients' event times."""
    coxnet: CoxnetSettings = CoxnetSettings()
    mil: MilSettings = MilSettings()


class SurvivalColumns(Section):
    """Columns of the follow-up. A patient's rows (the bag) must agree."""

    time: str
    """Column of the time to the event or to the last contact, in any one unit; above zero."""
    event: RowFilter
    """Column and the value(s) that mean that the event was seen, for example `{censorship: "0"}`: published
    tables disagree on which way round they count."""
    censored: RowFilter | None = None
    """The same column(s) with the values that mean that it was not. Without it a column may have one other value and
    no null; `*` stands for all other values."""

    def faults(self) -> Iterator[str]:
        yield from side_faults(self.event, self.censored, "event", "censored")

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.time, *self.event)


class Survival(Task[SurvivalSettings]):
    """Risk of every patient from the models of the folds that did not see the patient."""

    name = "survival"
    version = 2
    answers = "survival"
    settings = SurvivalSettings
    section = SurvivalColumns

    def towers(self, spec: DatasetSpec) -> tuple[Tower, ...]:
        return (self.own(spec).tower,)

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        own = self.own(spec)
        return tuple(Variant(head=head, seed=seed) for head in own.heads for seed in range(own.seeds))

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        """Concordance averaged over folds; patients are resampled inside their folds. Every pair that can be compared
        has a patient with an event: these are contrasted with all."""
        return Scoring(
            "standard",
            {"c_index": Metric(mean_over_folds(_c_index))},
            "c_index",
            resamples=folded_resamples,
            contrasts=lambda found: [(found.column("event") > 0, np.ones(len(found), dtype=bool))],
        )

    def problems(self, data: DatasetRows) -> list[str]:
        _, event = follow_up(bags := _patients(data))
        folds_of(bags, event.astype(np.int64), bags.groups, self.own(data.spec).folds, seed=0)
        return []

    def counts(self, data: DatasetRows) -> dict[str, dict[str, int]]:
        _, event = follow_up(bags := _patients(data))
        found = {"test patients": {"event": int(event.sum()), "censored": int((~event).sum())}}
        for column in data.spec.section(SurvivalColumns).event:
            values = Counter(value or "blank" for value in bags.column(column))
            found[f"test patients by {column}"] = dict(values.most_common())
        return found

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return risk, time and event of every patient, float64 (n, 3), with the fold that tested the patient."""
        settings = self.own(data.spec)
        bags = _patients(data)
        time, event = follow_up(bags)
        group, even = bags.groups, event.astype(np.int64)
        fold = folds_of(bags, even, group, settings.folds, variant.seed)
        known = BagFeatures(bags, features, settings.tower, settings.normalized)
        means, there = known.means()
        cohort = Cohort(means, time, event, group)
        chosen: list[dict[str, Any]] = []
        asked = data.spec.measures.survival
        times = asked.times if asked is not None else ()

        def risk_of(one: Round) -> Floats:
            """Risk of the round's test patients and their chances to live beyond `times`, float64 (m, 1 + T)."""
            if variant.head == "coxnet":
                model = fit_coxnet(cohort.take(one.seen), settings.coxnet, variant.seed)
                coefficients = int((model.coefficients != 0).sum())
                chosen.append({"alpha": model.alpha, "coefficients": coefficients, "converged": model.converged})
                risk, seen = model.risk(cohort.x[one.test]), model.risk(cohort.x[one.seen])
                alive = breslow(seen, time[one.seen], event[one.seen], risk, times)
            else:
                risk, alive, trained = _network(known, cohort, one, settings=settings, variant=variant, times=times)
                chosen.append(trained._asdict())
            return np.column_stack([risk, alive])

        risk = answers(len(bags), 1 + len(times), rounds(fold, there, even, group, variant.seed), risk_of)
        score = np.where(there[:, None], np.column_stack([risk[:, 0], time, event, risk[:, 1:]]), np.nan)
        late = sum(not one.get("converged", True) for one in chosen)
        doubts = [f"{late} of {len(chosen)} Cox regressions did not converge"] if late else []
        doubts += budget_warnings([Trained(**one) for one in chosen if "epoch" in one])
        info = {
            "events": int(event.sum()),
            "fold_sizes": np.bincount(fold).tolist(),
            "fold_events": np.bincount(fold, weights=event).astype(int).tolist(),
            "normalized": settings.normalized,
            "chosen": chosen,
            "warnings": doubts,
        }
        return answers_of_bags(bags, score, there, (*COLUMNS, *map(alive_at, times)), info=info, fold=fold)


def follow_up(bags: Bags) -> tuple[Floats, Bools]:
    """Return time float64 (n,) and event bool (n,) of every bag. Raises UserError for a time that is not positive, rows
    of a bag that differ, event values that the description does not name, or no event at all."""
    columns = bags.data.spec.section(SurvivalColumns)
    seen = bags.samples.two_way(columns.event, columns.censored, "survival: censored")
    event = bags.agreed(seen.astype(object), " and ".join(columns.event)).astype(bool)
    time = np.full(len(bags), np.nan)
    for i, text in enumerate(bags.column(columns.time)):
        with contextlib.suppress(TypeError, ValueError):
            time[i] = float(text)
        if not (np.isfinite(time[i]) and time[i] > 0):
            raise UserError(f"{bags.ids[i]!r} has {columns.time}={text!r}, expected a time above zero")
    if not event.any():
        raise UserError(
            f"all {len(event)} patients are censored: no row has {columns.event}; check the column and what it counts"
        )
    return time, event


def _c_index(found: Predictions, weights: Floats) -> Floats:
    return concordance(found.column("risk"), found.column("time"), found.column("event") > 0, weights)


def _patients(data: DatasetRows) -> Bags:
    return make_bags(data, data.split("test"), data.spec.group or data.spec.bag)


def _network(
    known: BagFeatures,
    cohort: Cohort,
    one: Round,
    *,
    settings: SurvivalSettings,
    variant: Variant,
    times: tuple[float, ...],
) -> tuple[Floats, Floats, Trained]:
    """Risk of test patients by attention over patches, (m,), and their chances to live beyond `times`, (m, T)."""
    from mmkd.evaluate.heads.abmil import fit_predict  # noqa: PLC0415 (torch, for those who ask for it)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchsurv uses torch.jit, which torch deprecates
        from mmkd.evaluate.heads.survival_losses import (  # noqa: PLC0415
            cox_task,
            hazard_task,
            risk_of_hazards,
            time_bins,
        )

    time, event = cohort.time[one.seen], cohort.event[one.seen]
    if variant.head == "abmil_cox":
        everyone = replace(one, test=np.concatenate([one.test, one.seen]))
        task = cox_task(cohort.time, cohort.event)
        outputs, trained = fit_predict(known, task, everyone, settings=settings.mil, seed=variant.seed)
        risk, seen = np.split(outputs[:, 0], [len(one.test)])
        return risk, breslow(seen, time, event, risk, times), trained
    task = hazard_task(cohort.time, cohort.event, one.seen, settings.bins)
    outputs, trained = fit_predict(known, task, one, settings=settings.mil, seed=variant.seed)
    knots = np.concatenate([[0.0], time_bins(time, event, settings.bins), [time.max()]])
    return risk_of_hazards(outputs), interpolated(outputs, knots, times), trained


def breslow(seen: Floats, time: Floats, event: Bools, log_hazard: Floats, times: tuple[float, ...]) -> Floats:
    """Return chances of survival, float64 (m, T), at `times` for subjects with these log-hazards (m,), with the
    baseline of subjects `seen` in training, float64 (n,): Breslow 1972."""
    highest = seen.max()
    deaths, order = np.unique(time[event], return_counts=True), np.argsort(time, kind="stable")
    at_risk = np.cumsum(np.exp(seen[order] - highest)[::-1])[::-1]
    baseline = np.cumsum(deaths[1] / at_risk[np.searchsorted(time[order], deaths[0])])
    until = np.append(0.0, baseline)[np.searchsorted(deaths[0], times, side="right")]
    return np.exp(-np.outer(np.exp(log_hazard - highest), until))


def interpolated(logits: Floats, knots: Floats, times: tuple[float, ...]) -> Floats:
    """Return chances of survival, float64 (m, T), from the logits of discrete hazards, float64 (m, K), in bins between
    knots, float64 (K + 1,), linear within bins: constant density interpolation of Kvamme and Borgan 2021."""
    ends = np.cumprod(1 / (1 + np.exp(logits)), axis=1)
    return np.array([np.interp(times, knots, row) for row in np.pad(ends, ((0, 0), (1, 0)), constant_values=1.0)])
