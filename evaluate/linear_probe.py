"""Linear probe: logistic regression on unit features, with C chosen on validation data for every model."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from mmkd.base.arrays import Floats, Ints, Objects
from mmkd.evaluate.dataset import DatasetRows, Samples
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.features import Features
from mmkd.evaluate.measured import Answers
from mmkd.evaluate.predictions import Predictions, Validation
from mmkd.evaluate.scoring import STANDARD, Scoring
from mmkd.evaluate.splits import draw_share, group_leaks, hold_out, probe_splits
from mmkd.evaluate.task import Task, TaskSettings, Variant, answers_of_test, without_features
from mmkd.store import UserError


class LinearProbeSettings(TaskSettings):
    """Logistic regression on unit features, its strength chosen on validation data for every model."""

    c_low: float = Field(default=1e-4, gt=0)
    c_high: float = Field(default=1e6, gt=0)
    c_steps: int = Field(default=21, ge=1)
    """Logarithmic grid of scikit-learn's C. On unit features one fixed C would measure feature scale."""
    fractions: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Shares of the labels (training and validation alike), drawn per class, at least one of each."""
    seeds: int = Field(default=5, ge=1)
    """Draws of each share below 1."""
    fallback_c: float = Field(default=10.0, gt=0)
    """C when there is nothing to validate on: no class has two groups to divide."""
    max_iter: int = Field(default=2000, ge=1)
    """L-BFGS iterations of a fit. A C whose fit does not converge within them is not chosen."""
    tolerance: float = Field(default=1e-6, gt=0)
    """Largest gradient component of the mean loss at which a fit has converged. scikit-learn's own 1e-4 stops so early
    that the choice of C depends on it."""
    val: Literal["choose", "calibrate"] = "choose"
    """What validation rows are for: to choose C by, after which they are fitted with the others; or for a temperature
    and conformal sets alone, as if there were none for C."""
    max_train: int = Field(default=100_000, ge=2)
    """Cap on training rows, drawn per class; the number used is in every result."""

    def faults(self) -> Iterator[str]:
        if self.c_low > self.c_high:
            yield f"c_low {self.c_low:g} is above c_high {self.c_high:g}"
        wrong = [share for share in self.fractions if not 0 < share <= 1]
        if wrong or not self.fractions:
            yield f"fractions must be within (0, 1], got {wrong or 'none'}"

    def grid(self) -> Floats:
        """Values of C to try, ascending, float64 (c_steps,)."""
        return np.logspace(np.log10(self.c_low), np.log10(self.c_high), self.c_steps)


@dataclass(frozen=True)
class Labeled:
    """Features with labels. x: float64 (n, D); y: int64 (n,), or (n, L) with several labels; group: str (n,)."""

    x: Floats
    y: Ints
    group: Objects

    def take(self, chosen: NDArray[Any]) -> "Labeled":
        """Return rows by mask or position."""
        return Labeled(self.x[chosen], self.y[chosen], self.group[chosen])


class LinearProbe(Task[LinearProbeSettings]):
    """L2-regularized softmax regression by L-BFGS. An ensemble probes its members' features side by side."""

    name = "linear_probe"
    version = 2
    answers: ClassVar[Answers] = "classes"
    settings = LinearProbeSettings

    def needs(self, spec: DatasetSpec) -> Iterator[str]:
        if spec.label is None:
            yield "linear_probe needs a `label` column"
        if spec.rows.train is None:
            yield "linear_probe needs `rows: train`"
        if self.own(spec).val == "calibrate" and spec.rows.val is None:
            yield "linear_probe: `val: calibrate` needs `rows: val`"
        if self.own(spec).val == "choose" and spec.measures.calibrates:
            yield (
                "linear_probe is fitted on the `val` rows, on which a temperature and conformal sets would be chosen; "
                "keep them apart with `settings: {linear_probe: {val: calibrate}}`"
            )

    def validates(self, spec: DatasetSpec) -> bool:
        return self.own(spec).val == "calibrate" and spec.rows.val is not None

    def variants(self, spec: DatasetSpec) -> tuple[Variant, ...]:
        own = self.own(spec)
        draws = {share: own.seeds if share < 1 else 1 for share in own.fractions}
        return tuple(Variant(fraction=share, seed=seed) for share, n in draws.items() for seed in range(n))

    def standard_scoring(self, spec: DatasetSpec) -> Scoring:
        return STANDARD

    def problems(self, data: DatasetRows) -> list[str]:
        return data.class_problems(probe_splits(data)) + group_leaks(data, probe_splits(data))

    def predict(self, variant: Variant, data: DatasetRows, features: Features) -> Predictions:
        """Return class probabilities, float64 (n, C), of every test image."""
        settings = self.own(data.spec)
        train, val, missing = training_rows(data, features, settings, variant, data.labels)
        held, val = (val, None) if self.validates(data.spec) else (None, val)
        model, facts = fit_chosen(train, val, settings, variant.seed)
        images = features.images(data.split("test").rows)
        there = images.available
        score = np.full((len(there), len(data.classes)), np.nan)
        score[there] = class_probabilities(model, images.values[there].astype(np.float64), len(data.classes))
        info = facts | {"train_classes": len(model.classes_), "warnings": fit_warnings([facts])}
        if bare := [name for i, name in enumerate(data.classes) if i not in model.classes_]:
            info["warnings"].append(
                f"no training rows of {', '.join(bare)}: score 0 everywhere, AUROC one half, counted in the means"
            )
        info["warnings"] += missing
        answered = (
            Validation(held.y, class_probabilities(model, held.x, len(data.classes))) if held is not None else None
        )
        return answers_of_test(data, score, there, data.classes, info=info, labeled=True, validation=answered)


def class_probabilities(model: LogisticRegression, x: Floats, classes: int) -> Floats:
    """Class probabilities, float64 (n, classes), 0 for a class that was not trained."""
    score = np.zeros((len(x), classes))
    score[:, model.classes_] = model.predict_proba(x)
    return score


def training_rows(
    data: DatasetRows,
    features: Features,
    settings: LinearProbeSettings,
    variant: Variant,
    labels: Callable[[Samples], NDArray[Any]],
) -> tuple[Labeled, Labeled | None, list[str]]:
    """Return the training and validation rows of a variant that have features, with the `labels` of a split's rows, and
    warnings of the others. Raises UserError for groups in two splits, or a split without features."""
    for leak in group_leaks(data, probe_splits(data)):
        raise UserError(leak)
    parts: dict[str, Labeled] = {}
    missing: list[str] = []
    for split in probe_splits(data)[:-1]:
        samples = data.split(split)
        images = features.images(samples.rows)
        there = images.available
        if not there.any():
            raise UserError(f"{features.model} has no image features for any of the {len(samples)} {split} rows")
        # float64, because scikit-learn's L-BFGS stops early in float32 at large C.
        x = images.values[there].astype(np.float64)
        rows = Labeled(x, labels(samples)[there].astype(np.int64), data.groups(samples)[there])
        parts[split] = draw_rows(rows, variant, settings)
        missing += without_features(len(x), len(samples), f"{split} rows")
    return parts["train"], parts.get("val"), missing


def draw_rows(data: Labeled, variant: Variant, settings: LinearProbeSettings) -> Labeled:
    """Return a share of the rows, drawn within each class, or within the rarest label that each row has."""
    share = min(variant.fraction, settings.max_train / len(data.y))
    if share >= 1:
        return data
    strata = data.y
    if strata.ndim == 2:
        counts = (data.y == 1).sum(axis=0)
        has = data.y[:, np.argsort(counts, kind="stable")] == 1
        strata = np.where(has.any(axis=1), has.argmax(axis=1), len(counts))
    return data.take(draw_share(strata, share, variant.seed))


def fit_warnings(fits: list[dict[str, Any]]) -> list[str]:
    """Warn of fits that did not converge, from the facts that `fit_chosen` leaves."""
    found = []
    if late := sum(not one.get("converged", True) for one in fits):
        found.append(f"{late} of {len(fits)} logistic regressions did not converge; raise max_iter or lower c_high")
    if any(one.get("c_converged") == 0 for one in fits):
        found.append("no C of the grid converged, C is fallback_c; raise max_iter or lower c_low")
    return found


def fit_chosen(
    train: Labeled, val: Labeled | None, settings: LinearProbeSettings, seed: int
) -> tuple[LogisticRegression, dict[str, Any]]:
    """Choose C, then fit on training and validation rows. Returns the model, and facts."""
    c, facts = choose_c(train, val, settings, seed)
    if val is not None:
        x, y, group = (np.concatenate([getattr(train, name), getattr(val, name)]) for name in ("x", "y", "group"))
        train = Labeled(x, y, group)
    model, converged = fit(train, c, settings)
    return model, facts | {"train_rows": len(train.y), "converged": converged}


def choose_c(
    train: Labeled, val: Labeled | None, settings: LinearProbeSettings, seed: int
) -> tuple[float, dict[str, Any]]:
    """Return the (smallest) C with the lowest validation log-loss among the fits that converged, and facts: `c`,
    `c_chosen_on` (validation rows), `c_converged` (fits), `c_at_edge`. Without validation rows a fifth of the training
    groups is held out; without groups to hold out, or a fit that converges, C is `settings.fallback_c`."""
    if val is None:
        out = hold_out(train.y, train.group, seed)
        train, val = train.take(~out), train.take(out)
    # A class outside the training part cannot distinguish values of C.
    val = val.take(np.isin(val.y, train.y))
    if len(val.y) == 0 or len(np.unique(train.y)) < 2:
        return settings.fallback_c, {"c": settings.fallback_c, "c_chosen_on": 0}
    grid, losses = settings.grid().tolist(), np.full(settings.c_steps, np.inf)
    warm: LogisticRegression | None = None
    own, least = np.searchsorted(np.unique(train.y), val.y)[:, None], np.finfo(np.float64).eps
    for i, c in enumerate(grid):
        warm, converged = fit(train, c, settings, warm)
        if converged:  # the log-loss of scikit-learn, whose checks take longer than the fit
            chances = np.take_along_axis(warm.predict_proba(val.x), own, axis=1)
            losses[i] = -np.log(chances.clip(least, 1 - least)).mean()
    best, count = int(np.argmin(losses)), int(np.isfinite(losses).sum())
    chosen = grid[best] if count else settings.fallback_c
    facts = {"c": chosen, "c_chosen_on": len(val.y), "c_converged": count, "c_at_edge": best in (0, len(grid) - 1)}
    return chosen, facts


def fit(
    data: Labeled, c: float, settings: LinearProbeSettings, warm: LogisticRegression | None = None
) -> tuple[LogisticRegression, bool]:
    """Fit logistic regression at one C, from where `warm` stopped if given; and whether it converged."""
    model = warm or LogisticRegression(max_iter=settings.max_iter, tol=settings.tolerance, warm_start=True)
    model.set_params(C=c)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(data.x, data.y)
    late = [one for one in caught if issubclass(one.category, ConvergenceWarning)]
    for other in (one for one in caught if one not in late):
        warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return model, not late
