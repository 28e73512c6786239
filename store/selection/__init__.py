"""Teacher weighting by sample: rules over stored features, written as `selections/<name>` of the store."""

from mmkd.store.selection.compute import SelectionReport, select
from mmkd.store.selection.rule import SelectionRule, load_rule
from mmkd.store.selections import Selection, SelectionCard, read_selection, selection_names

__all__ = [
    "Selection",
    "SelectionCard",
    "SelectionReport",
    "SelectionRule",
    "load_rule",
    "read_selection",
    "select",
    "selection_names",
]
