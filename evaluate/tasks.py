"""Table of tasks, and the description of a data set with the settings and sections of all of them."""

from collections.abc import Iterator
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any, ClassVar, Final

from pydantic import create_model, field_validator

from mmkd.base.config import Frozen
from mmkd.evaluate.dataset_spec import DatasetSpec, Section
from mmkd.evaluate.measured import measure_needs
from mmkd.evaluate.task import Task

CLASSES: Final = (
    "mmkd.evaluate.zero_shot:ZeroShot",
    "mmkd.evaluate.linear_probe:LinearProbe",
    "mmkd.evaluate.few_shot:FewShot",
    "mmkd.evaluate.multilabel:MultilabelZeroShot",
    "mmkd.evaluate.multilabel:MultilabelProbe",
    "mmkd.evaluate.retrieval:Retrieval",
    "mmkd.evaluate.vqa:Vqa",
    "mmkd.evaluate.multiple_choice:MultipleChoice",
    "mmkd.evaluate.survival:Survival",
    "mmkd.evaluate.diagnosis:Diagnosis",
)
"""Module and class of every task. A new task is a module and a line here."""

_ALL: Final[tuple[Task[Any], ...]] = tuple(resolve_name(name)() for name in CLASSES)
TASKS: Final[MappingProxyType[str, Task[Any]]] = MappingProxyType({task.name: task for task in _ALL})
"""Name to task."""

_SETTINGS: Final[dict[str, Any]] = {task.name: (task.settings, task.settings()) for task in _ALL}
_SECTIONS: Final[dict[str, type[Section]]] = {task.name: task.section for task in _ALL if task.section is not None}

TaskSettings = create_model("TaskSettings", __base__=Frozen, __module__=__name__, **_SETTINGS)
"""Settings of every task; the field names are the names of the tasks."""


class _CheckedDataset(DatasetSpec):
    sections: ClassVar[dict[str, type[Section]]] = _SECTIONS

    @field_validator("tasks", check_fields=False)
    @classmethod
    def _tasks_exist(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                raise ValueError(f"no task {task!r}; the tasks are {', '.join(TASKS)}")
        return tuple(dict.fromkeys(tasks))

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        for task in self.tasks:
            for need in TASKS[task].needs(self):
                yield f"{self.dataset}: {need}"
        calibrated = [TASKS[task].validates(self) for task in self.tasks if TASKS[task].answers == "classes"]
        for need in measure_needs(self, calibrated):
            yield f"{self.dataset}: {need}"


Dataset = create_model(
    "Dataset",
    __base__=_CheckedDataset,
    __module__=__name__,
    settings=(TaskSettings, TaskSettings()),
    **{name: (section | None, None) for name, section in _SECTIONS.items()},  # type: ignore[call-overload]
)
"""Description of a data set: `DatasetSpec` with `settings` and one field for each task's section."""
