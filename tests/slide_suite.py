"""A suite of slides whose sick ones hide one telling patch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from planted_store import store_of

from mmkd.store.writer import ShardFeatures

PATCHES, DIM = 12, 8


def slides(folder: Path, shuffled: bool = False, **changes: Any) -> Path:
    """120 slides of 60 patients; in sick ones one patch of twelve points along a hidden direction. Slide 0 is empty."""
    rng = np.random.default_rng(7)
    sick = np.repeat(rng.random(60) < 0.5, 2)
    shown = rng.permutation(sick[::2]).repeat(2) if shuffled else sick
    rows, x = [], []
    for slide in range(120):
        for patch in range(PATCHES):
            label = "tumour" if shown[slide] else "normal"
            fields = {
                "slide": f"s{slide}",
                "patient": f"p{slide // 2}",
                "label": label,
                "site": f"site{slide // 2 % 3}",
            }
            rows.append({"key": f"s{slide}-{patch}", "caption": "", **fields})
            patch_feature = rng.normal(size=DIM)
            if sick[slide] and patch == slide % PATCHES:
                patch_feature = np.eye(DIM)[0] * 6
            x.append(patch_feature)
    for row, values in changes.pop("rows", {}).items():
        rows[row] |= values
    image = np.array(x, dtype=np.float16)
    valid = np.ones(len(rows), dtype=np.uint8)
    valid[:PATCHES] = 0
    features = {"alpha": ShardFeatures(image, image * np.nan, valid)}
    store_of(folder / "store", rows, ("slide", "patient", "label", "site"), features)
    probe = {"c_low": 1e-2, "c_high": 1e4, "c_steps": 4}
    mil = {"epochs": 40, "patience": 40, "lr": 5e-3, "hidden": 32, "attention": 16, "batch": 16, "dropout": 0.0}
    content = {
        "suite": "slides", "store": "store", "bootstrap": {"n": 200},
        "settings": {"diagnosis": {"folds": 2, "seeds": 1, "mil": mil, "probe": probe}},
        "datasets": [{
            "dataset": "lymph", "label": "label", "group": "patient", "bag": "slide", "rows": {"test": {}},
            "tasks": ["diagnosis"],
        } | changes],
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"
