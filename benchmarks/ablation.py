"""What do selections and alignments do for a student? The demo's real images, three seeds, equal steps; writes a table.

    mmkd demo DEMO                                          once: its stores are used
    python -P benchmarks/ablation.py DEMO OUT [--seeds 0,1,2] [--epochs 6] [--table docs/ablation.md]

Runs, judges and tabulates as `students.py` beside it does, with other recipes and a smaller student. Selections are
added to DEMO's store (`ablation-...`; features are not touched), alignments are written to OUT.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from mmkd.base.errors import UserError
from mmkd.demo.run import STUDENT_MODEL
from mmkd.distill.alignment.config import AlignConfig
from mmkd.distill.alignment.fit import align
from mmkd.store import FeatureStore
from mmkd.store.selection import SelectionRule, load_rule, select, selection_names
from mmkd.store.selection.rules import find_rule

REFERENCE = "no selection, a head for each teacher"
RULES = ("retrieval_rank", "best_three", "cosine_fifth", "agreement")
METHODS: dict[str, dict[str, Any]] = {
    "PCA": {"pca": {}},
    "PHI-S": {"whitening": {}},
    "Procrustes": {"procrustes": {}},
    "joint maps": {"joint": {"steps": 200, "batch_size": 256}},
    "autoencoder of the original": {"autoencoder": {"steps": 100, "batch_size": 256, "hidden": 256}},
}
EPOCHS, BATCH = 6, 64  # of `students.py`
SMALLER = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32, "patch_size": None}


def home_rule(store: FeatureStore) -> SelectionRule:
    """Every specialist on its own domain: what a user who knows the teachers would write."""
    domains = set(store.sample_table(["domain"])["domain"].to_pylist())
    homes = {slug: [own] for slug in store.teachers if (own := slug.removesuffix("-specialist")) in domains}
    return SelectionRule.model_validate({"keep": {"home": {"column": "domain", "teachers": homes, "unlisted": "drop"}}})


def equal_steps(store: FeatureStore, selection: str) -> dict[str, Any]:
    """A selection that leaves rows without a teacher gets more epochs of the others: as many steps as all rows get.

    Raises:
        UserError: it leaves fewer rows than one batch.
    """
    rows = int(store.available(selection).any(axis=1).sum())
    if rows < BATCH:
        raise UserError(f"selection {selection!r} leaves {rows} rows with a teacher, fewer than one batch of {BATCH}")
    return {"selection": selection, "epochs": round(EPOCHS * (len(store) // BATCH) / (rows // BATCH))}


def selected(store: FeatureStore, name: str, rule: SelectionRule) -> dict[str, Any]:
    """Make a rule's selection unless it is there; what a run with it says.

    Raises:
        UserError: the rule cannot judge this store, keeps nothing, or leaves fewer rows than one batch.
    """
    selection = f"ablation-{name.replace('_', '-')}"
    if selection not in selection_names(store.root):
        select(store, selection, rule, by="domain")
    return equal_steps(store, selection)


def recipes(demo: Path, out: Path) -> dict[str, dict[str, Any]]:
    """Make what is missing of selections and alignments; name to what differs from the base run."""
    out.mkdir(parents=True, exist_ok=True)
    model = out / "smaller-student.json"
    model.write_text(json.dumps(STUDENT_MODEL | {"vision_cfg": SMALLER}))
    # Images are read between the steps: a worker process for each of many short runs costs more than it gives.
    student = {"student": {"model": str(model)}, "data": {"crop_scale": (0.6, 1.0), "workers": 0}}
    store = FeatureStore.open(demo / "features")
    rules = {"home": home_rule(store)} | {name: load_rule(find_rule(name)) for name in RULES}
    found: dict[str, dict[str, Any]] = {
        REFERENCE: student,
        "pairs alone": student | {"loss": {"feature": 0.0, "cross": 0.0}},
    }
    for name, rule in rules.items():
        try:
            found[f"selection {name}"] = student | selected(store, name, rule)
        except UserError as error:  # a small corpus: 256 rivals may be all of it, and a rule may keep next to nothing
            print(f"without selection {name}: {error}", flush=True)
    for name, method in METHODS.items():
        path = out / f"{next(iter(method))}.safetensors"
        if not path.is_file():
            align(store, AlignConfig.model_validate({"out": path, "method": method, "dim": STUDENT_MODEL["embed_dim"]}))
        found[f"alignment {name}"] = student | {"heads": {"alignment": path}}
    if "selection retrieval_rank" in found:
        both = found["selection retrieval_rank"] | found["alignment PHI-S"]
        found["selection retrieval_rank, alignment PHI-S"] = both
    return found


def main() -> None:
    """Put our recipes in place of those of `students.py`, and run it."""
    place = importlib.util.spec_from_file_location("students", Path(__file__).with_name("students.py"))
    assert place is not None
    assert place.loader is not None
    students: Any = importlib.util.module_from_spec(place)
    place.loader.exec_module(students)
    demo, out = (Path(argument) for argument in sys.argv[1:3])
    students.RECIPES, students.REFERENCE = recipes(demo, out), REFERENCE
    students.main()


if __name__ == "__main__":
    main()
