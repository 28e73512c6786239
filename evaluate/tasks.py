"""The table of tasks: the only place that lists them."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from mmkd.evaluate.diagnosis import Diagnosis
from mmkd.evaluate.linear_probe import LinearProbe
from mmkd.evaluate.multilabel_probe import MultilabelProbe
from mmkd.evaluate.multilabel_zero_shot import MultilabelZeroShot
from mmkd.evaluate.retrieval import Retrieval
from mmkd.evaluate.survival import Survival
from mmkd.evaluate.task import Task
from mmkd.evaluate.vqa import Vqa
from mmkd.evaluate.zero_shot import ZeroShot

_ALL: tuple[Task, ...] = (
    ZeroShot(), LinearProbe(), MultilabelZeroShot(), MultilabelProbe(), Retrieval(), Vqa(), Survival(), Diagnosis(),
)  # fmt: skip

TASKS: Final[MappingProxyType[str, Task]] = MappingProxyType({task.name: task for task in _ALL})
"""Name to task; the names are the fields of `mmkd.evaluate.settings.TaskSettings`."""
