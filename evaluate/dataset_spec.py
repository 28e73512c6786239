"""One data set of a suite: which rows of a store it is, what their columns mean, and which tasks run on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mmkd.evaluate.settings import TaskSettings
from mmkd.store.errors import UserError
from mmkd.store.layout import check_slug
from mmkd.store.yaml_config import Frozen

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


Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
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

    rows: RowFilter
    label: str | None = None
    """Column that holds the class of a prompt; by default the data set's label column."""


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
    store: str
    """Path of the mmkd store that holds its rows and the features of all models."""
    modality: str = "unspecified"
    role: Literal["monitor", "report"] = "report"
    """`monitor` sets may be looked at while a student is trained or chosen, `report` sets may not."""
    label: str | None = None
    classes: Texts | None = None
    """Class names in order. By default the classes of the prompts, or of the test rows, sorted."""
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
        if self.survival is not None:
            named += [self.survival.time, *self.survival.event]
        if self.vqa is not None:
            named += [self.vqa.answer, *self.vqa.closed]
        return tuple(dict.fromkeys(name for name in named if name is not None))

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
        if "zero_shot" in self.tasks and self.prompts is None:
            raise ValueError(f"{self.dataset}: zero_shot needs `prompts`")
        for task in ("linear_probe", "vqa"):
            if task in self.tasks and self.rows.train is None:
                raise ValueError(f"{self.dataset}: {task} needs `rows: train`")
        for task, columns in (("survival", self.survival), ("vqa", self.vqa)):
            if task in self.tasks and columns is None:
                raise ValueError(f"{self.dataset}: {task} needs `{task}`, the columns that it reads")
        if self.settings.zero_shot.protocol == "mmkd_official" and "zero_shot" in self.tasks and self.classes is None:
            raise ValueError(f"{self.dataset}: protocol mmkd_official needs `classes`: their order decides the F1")
        return self
