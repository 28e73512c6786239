"""Figures of an output folder: every one has the numbers of samples, intervals where there are any, and safe colours.

from mmkd.evaluate.figures import FIGURES, save

save(FIGURES["forest"](folder, Question("zero_shot"), "student"), Path("forest.svg"))
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure

from mmkd.evaluate.figures.box import box
from mmkd.evaluate.figures.forest import forest
from mmkd.evaluate.figures.heat_map import heat_map
from mmkd.evaluate.figures.kaplan_meier import kaplan_meier
from mmkd.evaluate.figures.label_efficiency import label_efficiency
from mmkd.evaluate.figures.radar import radar
from mmkd.evaluate.figures.style import PLAIN_TEXT, save
from mmkd.evaluate.folder import Question, ResultFolder

FIGURES: Final[MappingProxyType[str, Callable[[ResultFolder, Question, str], Figure]]] = MappingProxyType(
    {
        name: mpl.rc_context(PLAIN_TEXT)(draw)
        for name, draw in {
            "heat-map": heat_map,
            "forest": forest,
            "box": box,
            "radar": radar,
            "label-efficiency": label_efficiency,
            "kaplan-meier": kaplan_meier,
        }.items()
    }
)
"""Name to the function that draws it from (results, question, the model that is compared with the others)."""

__all__ = ["FIGURES", "save"]
