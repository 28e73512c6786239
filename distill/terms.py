"""The loss terms that ask teachers, by name. Knows no torch: a run's file is checked before that is imported."""

from collections.abc import Callable, Mapping
from operator import methodcaller
from typing import Any, Literal

FeatureKind = Literal["cosine", "mse", "smooth_l1"]

TERMS: dict[str, Callable[[Any], Any]] = {
    name: methodcaller(name) for name in ("feature", "cross", "bank", "relational")
}
"""Functions of a `losses.Comparison`, ours its methods, that return a value of each row for each teacher, float (T, Q);
rows that a teacher lacks may hold anything finite. Each is a weight of its name in a run's `loss:`, by default that of
`DEFAULT_WEIGHTS` or 0."""
ONE_TOWER_TERMS = frozenset({"feature"})
"""Terms that learn from the one tower of a teacher without the other; all others leave such teachers out."""
UNPAIRED_TERMS = ONE_TOWER_TERMS | {"relational"}
"""Terms that learn from a row with an image or a text alone; all others, and `task`, take pairs."""
DEFAULT_WEIGHTS: Mapping[str, float] = {"feature": 1.0, "cross": 1.0}
