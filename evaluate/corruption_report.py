"""What corruptions of test images cost, as tables, text and JSON."""

import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from mmkd.base.images.corruptions import Corruptions
from mmkd.base.text import counted, one_line, plain_values, table_lines
from mmkd.evaluate.results import code_digest
from mmkd.evaluate.scoring import BootstrapSettings
from mmkd.evaluate.statistics import Difference, interval_text

SCHEMA, VERSION = "mmkd.corruptions", 1
FEATURES, ALL = "features", "all"


@dataclass(frozen=True)
class Drop:
    """One model on one task (`features`: the cosine to the clean feature) at one family and severity; family `all`:
    the mean over all, resample by resample, on the images that all have. clean, value: of the metric on the same
    samples. low, high: of value. drop: value minus clean, paired."""

    model: str
    task: str
    metric: str
    family: str
    severity: int
    clean: float
    value: float
    low: float
    high: float
    drop: Difference
    percent: bool

    def shown(self) -> str:
        """The cosine, or the change of a task's metric, with its interval."""
        if self.task == FEATURES:
            return interval_text(self.value, self.low, self.high, ".3f")
        return self.drop.text(self.percent)


@dataclass(frozen=True)
class CorruptionReport:
    """All models on one data set."""

    suite: str
    suite_version: int
    dataset: str
    recipe: Corruptions
    samples: int
    models: tuple[str, ...]
    bootstrap: BootstrapSettings
    data_digest: str
    features_digests: dict[str, str]
    drops: tuple[Drop, ...]
    notes: tuple[str, ...]

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Yield title, heads and rows for the features and each task: a row for each model and family."""
        severities = (*self.recipe.severities, 0)
        for task in dict.fromkeys(one.task for one in self.drops):
            cells = {(one.model, one.family, one.severity): one for one in self.drops if one.task == task}
            metric = next(iter(cells.values())).metric
            title = "cosine to the clean feature" if task == FEATURES else f"{task}, {metric}: change"
            rows = []
            for model, family in dict.fromkeys((one.model, one.family) for one in cells.values()):
                line = [cells.get((model, family, severity)) for severity in severities]
                first = next(one for one in line if one is not None)
                clean = [f"{first.clean * 100:.1f}" if first.percent else f"{first.clean:.2f}"]
                shown = ["" if one is None else one.shown() for one in line]
                counts = sorted({one.drop.n for one in line if one is not None})
                n = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
                rows.append([model, family, n, *([] if task == FEATURES else clean), *shown])
            clean_head = [] if task == FEATURES else ["clean"]
            yield title, ["model", "family", "n", *clean_head, *map(str, self.recipe.severities), "mean"], rows

    def text(self) -> str:
        lines = [f"{self.dataset}: corruptions {self.recipe.suite} of {counted(self.samples, 'test image')}"]
        for title, heads, rows in self.tables():
            lines += [title, *table_lines(heads, rows)]
        return "\n".join(map(one_line, [*lines, *(f"  {note}" for note in self.notes)]))

    def as_json(self) -> str:
        content = {
            "schema": SCHEMA, "version": VERSION, "suite": self.suite, "suite_version": self.suite_version,
            "dataset": self.dataset, "recipe": self.recipe.model_dump(), "samples": self.samples,
            "data_digest": self.data_digest, "features_digests": self.features_digests, "code_digest": code_digest(),
            "code_version": importlib.metadata.version("mmkd"), "bootstrap": self.bootstrap.model_dump(),
            "notes": self.notes, "drops": [asdict(one) for one in self.drops],
        }  # fmt: skip
        return json.dumps(plain_values(content), indent=1) + "\n"
