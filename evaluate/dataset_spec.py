"""One data set of a suite: which rows of a store it is, what their columns mean, and which tasks run on it."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mmkd.base.config import Frozen
from mmkd.base.errors import UserError
from mmkd.store.evaluation_rows import CANDIDATE, KIND, NEGATIVE, PROMPT, SAMPLE, TEXT_OF
from mmkd.evaluate.about import About
from mmkd.evaluate.settings import TaskSettings
from mmkd.store.layout import check_slug

TASK_NAMES = tuple(TaskSettings.model_fields)


def _texts(value: object) -> object:
    """One value or several, as strings: the sample table's labels are strings."""
    values = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(one, bool) for one in values):
        raise ValueError(f"YAML reads {values!r} as true or false; put the value in quotes")
    return tuple(str(one) if isinstance(one, int) else one for one in values)


def folder_name(name: str) -> str:
    """`name`, which becomes a folder or a file of the results.

    Raises:
        ValueError: it cannot be one.
    """
    try:
        return check_slug(name)
    except UserError:
        raise ValueError(f"{name!r} must be up to 64 lower-case letters, digits, '-', '_' or '.'") from None


def _classes(value: object) -> object:
    """Class names with the values that stand for them; in a list a name is its own value."""
    if isinstance(value, list | tuple):
        return {name: (name,) for name in _texts(value)}  # type: ignore[attr-defined]
    if isinstance(value, dict):
        wrong = [name for name in value if isinstance(name, bool)]
        if wrong:
            raise ValueError(f"YAML reads a class name as {wrong[0]}; put it in quotes")
        return {str(name): values for name, values in value.items()}
    return value


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
Classes = Annotated[dict[str, Texts], BeforeValidator(_classes)]
RowFilter = dict[str, Texts]
"""Column to accepted value(s); a row must pass all columns. `{}` takes every row."""


class SplitFilters(Frozen):
    """Which rows of the store belong to which split."""

    test: RowFilter
    train: RowFilter | None = None
    val: RowFilter | None = None
    """Without one, a part of `train` is held out, whole groups at a time."""


class Prompts(Frozen):
    """Text rows of the same store whose captions describe the classes."""

    file: str | None = None
    """Prompt file of a set with a `source`, relative to the description; `rows` and `label` then follow from it."""
    rows: RowFilter
    label: str | None = None
    """Column that holds the class (its name) of a prompt; by default the data set's label column."""
    negatives: RowFilter | None = None
    """Rows that describe the absence of a class, for several labels an image."""


class SeveralLabels(Frozen):
    """Where the labels stand when a sample can have several. `classes` gives name and value of each."""

    column: str | None = None
    """Column that lists the values of those that are there; by default every class' value names a column of its own."""
    separator: str | None = None
    """Between the values in `column`; without one it holds a JSON list."""
    positive: Texts = ("1", "1.0", "true")
    """Values of a class' own column that mean that it is there."""
    negative: Texts = ("0", "0.0", "false")
    """Values that mean that it is not. All others are unknown: the sample does not count for that class."""


class SurvivalColumns(Frozen):
    """Where the follow-up stands. A patient's rows (the bag) must agree."""

    time: str
    """Column of the time to the event or to the last contact, in any one unit; above zero."""
    event: RowFilter
    """Column and the value(s) that mean that the event was seen, for example `{censorship: "0"}`: published
    tables disagree on which way round they count, so it is said here."""


class VqaColumns(Frozen):
    """Where answers stand. The caption of a row is the question, its image is what is asked about."""

    answer: str
    """Column of the right answer."""
    closed: RowFilter
    """Column and the value(s) that mark closed questions, for example `{answer_type: CLOSED}`."""
    candidates: RowFilter | None = None
    """Text rows `question answer` among which the head `rank` chooses; they have the answer in the answer column
    and the question's key, or its text, in the column `candidate_of`."""
    candidate_of: str = "question"


class DatasetSpec(Frozen):
    """One data set of a suite."""

    dataset: str
    version: int = 1
    about: About = About()
    described_in: str = ""
    """The file that this is read from; `load_suite` fills it in."""
    source: dict[str, Any] | None = None
    """How `mmkd extract` reads the set; see docs/corpora.md. Nothing of it enters a score."""
    store: str
    """Path of the mmkd store that holds its rows and the features of all models."""
    modality: str = "unspecified"
    role: Literal["monitor", "report"] = "report"
    """`monitor` sets may be looked at while a student is trained or chosen, `report` sets may not."""
    label: str | None = None
    classes: Classes | None = None
    """Class names in order, with the value or values of the label column that mean each: `{tumour: "yes", none: "no"}`.
    In a list a name is its own value. By default the classes of the prompts, or of the test rows, sorted."""
    multilabel: SeveralLabels | None = None
    """Instead of `label` where a sample can have several."""
    group: str | None = None
    """Column of the patient (or whatever makes rows dependent): intervals resample whole groups."""
    domain: str | None = None
    """Column by which tables may divide the rows."""
    bag: str | None = None
    """Column whose equal values make a bag of patches (a slide); by default every row is a bag of one."""
    fold: str | None = None
    """Column with the published folds, for tasks that cross-validate; by default folds are drawn."""
    survival: SurvivalColumns | None = None
    vqa: VqaColumns | None = None
    rows: SplitFilters
    prompts: Prompts | None = None
    tasks: tuple[str, ...] = Field(min_length=1)
    settings: TaskSettings = TaskSettings()
    notes: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the sample table that the tasks read, each once."""
        named = [self.label, self.group, self.domain, self.bag, self.fold]
        if self.multilabel is not None:
            own = (value for values in (self.classes or {}).values() for value in values)
            named += [self.multilabel.column] if self.multilabel.column is not None else own
        if self.survival is not None:
            named += [self.survival.time, *self.survival.event]
        if self.vqa is not None:
            named += [self.vqa.answer, *self.vqa.closed]
        return tuple(dict.fromkeys(name for name in named if name is not None))

    @model_validator(mode="before")
    @classmethod
    def _rows_of_a_description(cls, raw: Any) -> Any:
        """Fill in what follows from `source`: samples, prompts and candidates are told apart by `row_kind`."""
        if not isinstance(raw, dict):
            return raw
        if not isinstance(raw.get("source"), dict):
            if isinstance(raw.get("prompts"), dict) and raw["prompts"].get("file") is not None:
                raise ValueError("a prompt file is encoded with the `source`, which is missing")
            return raw
        filled = dict(raw)
        if isinstance(raw.get("rows"), dict):
            filled["rows"] = {
                split: {KIND: SAMPLE} | chosen if isinstance(chosen, dict) else chosen
                for split, chosen in raw["rows"].items()
            }
        prompts, vqa = raw.get("prompts"), raw.get("vqa")
        if isinstance(prompts, dict) and prompts.get("file") is not None:
            found = {"rows": {KIND: PROMPT}, "label": TEXT_OF, "negatives": {KIND: NEGATIVE}}
            filled["prompts"] = found | prompts
        if isinstance(vqa, dict) and raw["source"].get("candidates"):
            filled["vqa"] = {"candidates": {KIND: CANDIDATE}, "candidate_of": TEXT_OF} | vqa
        return filled

    @field_validator("classes")
    @classmethod
    def _values_mean_one_class(cls, classes: dict[str, tuple[str, ...]] | None) -> dict[str, tuple[str, ...]] | None:
        counts = Counter(value for values in (classes or {}).values() for value in values)
        twice = [value for value, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"value {twice[0]!r} means two classes")
        if classes is not None and not all(classes.values()):
            raise ValueError("a class has no value")
        return classes

    @field_validator("dataset")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        return folder_name(name)

    @field_validator("tasks")
    @classmethod
    def _tasks_exist(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASK_NAMES:
                raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASK_NAMES)}")
        return tuple(dict.fromkeys(tasks))

    @model_validator(mode="after")
    def _tasks_have_what_they_need(self) -> DatasetSpec:
        classify = {"zero_shot", "linear_probe", "diagnosis"} & set(self.tasks)
        if classify and self.label is None:
            raise ValueError(f"{self.dataset}: {sorted(classify)[0]} needs a `label` column")
        several = sorted({"multilabel_zero_shot", "multilabel_probe"} & set(self.tasks))
        if several and (self.multilabel is None or not self.classes):
            raise ValueError(f"{self.dataset}: {several[0]} needs `multilabel` and `classes`")
        if self.multilabel is not None and self.label is not None:
            raise ValueError(f"{self.dataset}: `label` is for one label a sample, `multilabel` for several; keep one")
        for task in ("zero_shot", "multilabel_zero_shot"):
            if task in self.tasks and self.prompts is None:
                raise ValueError(f"{self.dataset}: {task} needs `prompts`")
        for task in ("linear_probe", "multilabel_probe", "vqa"):
            if task in self.tasks and self.rows.train is None:
                raise ValueError(f"{self.dataset}: {task} needs `rows: train`")
        for task, columns in (("survival", self.survival), ("vqa", self.vqa)):
            if task in self.tasks and columns is None:
                raise ValueError(f"{self.dataset}: {task} needs `{task}`, the columns that it reads")
        if self.settings.zero_shot.protocol == "mmkd_official" and "zero_shot" in self.tasks and self.classes is None:
            raise ValueError(f"{self.dataset}: protocol mmkd_official needs `classes`: their order decides the F1")
        return self
