"""Running a suite: finished units are skipped, failures are recorded, the rest goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmkd.base.errors import ConfigError
from mmkd.base.files import disk_errors
from mmkd.base.lock import lock_until_closed
from mmkd.base.text import counted, one_line
from mmkd.evaluate.plan import make_plan, plan_path, write_plan
from mmkd.evaluate.processes import run_units
from mmkd.evaluate.results import append_results, code_digest, read_results
from mmkd.evaluate.suite import Suite
from mmkd.evaluate.task import Unit


@dataclass(frozen=True)
class Outcome:
    """Outcome of one unit."""

    unit: Unit
    status: str
    """`ran`, `done` (earlier) or `failed`."""
    reason: str = ""
    warnings: tuple[str, ...] = ()
    """Doubts about its values."""
    other_code: bool = False
    """Done by sources of mmkd.evaluate that are not those of now."""


@dataclass(frozen=True)
class RunReport:
    """Outcome of all units of a run."""

    out: Path
    outcomes: tuple[Outcome, ...]
    absent: tuple[str, ...] = ()
    """Data sets of the suite that nothing was extracted of."""

    def count(self, status: str) -> int:
        """Return units of this status."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Units without a result, with their reasons."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")

    def __str__(self) -> str:
        text = (
            f"{counted(len(self.outcomes), 'unit')}: {self.count('ran')} run, {self.count('done')} done before, "
            f"{len(self.failed)} failed; results in {self.out}"
        )
        others = sum(outcome.other_code for outcome in self.outcomes)
        if others:
            text += f"; {others} of those done before come from another version of the code, --force runs them again"
        doubts = Counter(text for outcome in self.outcomes for text in outcome.warnings)
        text += "".join(f"\nwarning ({counted(n, 'unit')}): {one_line(doubt)}" for doubt, n in doubts.most_common(5))
        if self.absent:
            text += f"\n{len(self.absent)} data sets are not extracted: {', '.join(self.absent)}; `check` says how"
        return text


def run_suite(
    suite: Suite,
    out: Path,
    *,
    selection: bool = False,
    force: bool = False,
    jobs: int = 1,
    progress: Callable[[Outcome, int], None] | None = None,
    waiting: Callable[[], None] | None = None,
) -> RunReport:
    """Run what is missing of a suite. Writes `plans/SUITE.json`, `results.jsonl` (append-only) and `predictions/` into
    `out`. A unit whose features, rows and settings are those of a stored result is not run again; failed units are.
    Raises ConfigError if the suite contradicts itself, or `selection` with report sets. Raises StoreError if a store
    cannot be opened, or results cannot be written.

    Args:
        suite: what to run.
        out: folder of the results.
        selection: the scores will be used to choose a model: suites with `role: report` sets are refused.
        force: run finished units again; their new rows count.
        jobs: units in hand at once, each in a process of its own with one thread. The numbers do not depend on it;
            the order of the lines in `results.jsonl` does. Processes are spawned, so a script that asks for more
            than one needs the usual `if __name__ == "__main__":`.
        progress: called after every unit with its outcome and the number of all units.
        waiting: called once where another run of this suite into `out` has to end first.
    """
    if selection:
        _refuse_report_sets(suite)
    loaded = make_plan(suite)
    units = loaded.plan.units
    outcomes: dict[str, Outcome] = {}

    def note(key: str, outcome: Outcome) -> None:
        outcomes[key] = outcome
        if progress is not None:
            progress(outcome, len(units))

    with _only_run(out, suite.suite, waiting):
        write_plan(out, loaded.plan)
        finished = {} if force else _finished(out)
        for planned in units:
            if planned.key in finished:
                note(planned.key, Outcome(planned.unit, "done", other_code=finished[planned.key] != code_digest()))
        for planned, rows in run_units(loaded, [one for one in units if one.key not in finished], out, jobs):
            append_results(out, rows)
            failed = rows[0].status == "failed"
            status, reason = ("failed", rows[0].reason) if failed else ("ran", "")
            note(planned.key, Outcome(planned.unit, status, reason, rows[0].warnings))
    return RunReport(out, tuple(outcomes[planned.key] for planned in units), loaded.plan.absent)


@contextmanager
def _only_run(out: Path, suite: str, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Wait until no other run of the suite works in `out`: it would compute the same units again."""
    path = plan_path(out, suite).with_suffix(".lock")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    with file:
        lock_until_closed(file, waiting)
        yield


def _refuse_report_sets(suite: Suite) -> None:
    reported = [spec.dataset for spec in suite.datasets if spec.role == "report"]
    if reported:
        raise ConfigError(
            f"suite {suite.suite!r} is to choose a model, but {reported[0]!r} has role `report`: a score on it would "
            "no longer be honest; choose on sets with `role: monitor`"
        )


def _finished(out: Path) -> dict[str, str]:
    """Return keys of units that have a result and their predictions, with the digest of the code that made them."""
    return {
        key: rows[0].code_digest
        for key, rows in read_results(out).items()
        if rows[0].status != "failed" and (out / rows[0].predictions).is_file()
    }
