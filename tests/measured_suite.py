"""A suite that asks for every measure of classes, over the planted store with sexes and ages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from planted_store import CLASSES, LABELS, planted_features, planted_rows, store_of

from mmkd.store.writer import ShardFeatures

MEASURES: dict[str, Any] = {
    "calibration": {"bins": 10, "temperature": True},
    "kappa": True,
    "conformal": {"coverage": [0.8, 0.9]},
    "operating": {"positive": ["adenoma", "carcinoma"], "specificity": [0.9], "thresholds": [0.2, 0.5]},
    "subgroups": {"sex": None, "age": [40, 60]},
}


def measured(folder: Path, models: dict[str, float] | None = None, **changes: Any) -> Path:
    """Patients of two images; sex is blank for one patient of the test rows and `other` for two."""
    rows = planted_rows(seed=5)
    for row in rows:
        patient = row.get("patient", "")
        number = int(patient.rpartition("p")[2] or 0)
        row["sex"] = {"test-p0": "", "test-p1": "other", "test-p2": "other"}.get(patient, "FM"[number % 2])
        row["age"] = str(20 + (number * 7) % 60)
    features = {}
    for seed, (slug, noise) in enumerate((models or {"sharp": 1.0, "blurred": 3.0}).items()):
        image, text = planted_features(rows, noise, seed)
        valid = np.array([2 if row["split"] == "prompt" else 3 for row in rows], dtype=np.uint8)
        valid[5] = valid[250] = 0  # a training and a test row
        features[slug] = ShardFeatures(image, text, valid)
    for row in rows:
        row["sex"] = row["sex"] or None
    store_of(folder / "store", rows, (*LABELS, "sex", "age"), features)
    content = {
        "suite": "measured",
        "store": "store",
        "bootstrap": {"n": 200},
        "settings": {
            "linear_probe": {"fractions": [1.0], "c_low": 0.01, "c_high": 1e4, "c_steps": 7, "val": "calibrate"},
            "few_shot": {"shots": [1, 4], "draws": 20},
            "diagnosis": {"heads": ["mean_pool"], "seeds": 1},
        },
        "measures": MEASURES,
        "datasets": [
            {
                "dataset": "specimens", "label": "label", "group": "patient", "classes": list(CLASSES),
                "rows": {name: {"split": name} for name in ("train", "val", "test")},
                "prompts": {"rows": {"split": "prompt"}}, "tasks": ["zero_shot", "linear_probe", "few_shot"],
            } | changes.pop("dataset", {})
        ],
    } | changes  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "suite.yaml"
