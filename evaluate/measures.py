"""Settings of the measures that a suite, or a data set, asks for beside the metrics of its tasks: `measures`."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated

from pydantic import AfterValidator, Field

from mmkd.base.config import Frozen


def _ascending(values: tuple[float, ...] | None) -> tuple[float, ...] | None:
    if values is not None and not all(one < other for one, other in pairwise(values)):
        raise ValueError(f"{list(values)} must ascend")
    return values


Share = Annotated[float, Field(gt=0, lt=1)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1), AfterValidator(_ascending)]
Times = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2), AfterValidator(_ascending)]


class Calibration(Frozen):
    """Expected calibration error and Brier score of probabilities."""

    bins: int = Field(default=15, ge=2)
    temperature: bool = False
    """Also after division of the logits by the temperature with the lowest log-loss on the `val` rows."""


class Conformal(Frozen):
    """Split conformal prediction sets, calibrated on the `val` rows."""

    coverage: Shares = (0.9,)


class Operating(Frozen):
    """Operating points and decision curves: some of the classes against the others."""

    positive: tuple[str, ...] = Field(min_length=1)
    """Class or classes that a finding means."""
    specificity: Shares = (0.9, 0.95)
    """Specificities at which the sensitivity is given."""
    thresholds: Shares = (0.1, 0.2, 0.5)
    """Threshold probabilities at which the net benefit is given."""


class SurvivalTimes(Frozen):
    """Time-dependent scores of survival."""

    times: Times
    """In the unit of the table; the Brier score is integrated from the first to the last."""


class Measures(Frozen):
    """What is asked for; nothing by default."""

    calibration: Calibration | None = None
    kappa: bool = False
    """Quadratic weighted kappa; `classes` name the grades from the lowest to the highest."""
    conformal: Conformal | None = None
    operating: Operating | None = None
    survival: SurvivalTimes | None = None
    subgroups: dict[str, Annotated[tuple[float, ...] | None, AfterValidator(_ascending)]] = Field(default_factory=dict)
    """Columns whose values divide the samples, with cuts where they are numbers: `{sex: null, age: [40, 65]}`."""

    @property
    def calibrates(self) -> bool:
        """Whether something is chosen on validation rows that nothing else was fitted on."""
        return self.conformal is not None or (self.calibration is not None and self.calibration.temperature)

    def faults(self) -> Iterator[str]:
        if "" in self.subgroups:
            yield "subgroups name a blank column"
