"""A suite of patients whose features tell how long they live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from planted_store import store_of

from mmkd.store.writer import ShardFeatures


def patients(folder: Path, signal: float = 2.0, seed: int = 3, **changes: Any) -> Path:
    """90 patients of one or two rows whose first feature speeds their death; one has no features at all."""
    rng = np.random.default_rng(seed)
    rows, x = [], []
    for i in range(90):
        hidden = rng.normal()
        death, lost = rng.exponential(np.exp(-signal * hidden)), rng.exponential(2.0)
        for slide in range(1 + i % 2):
            fields = {"months": f"{min(death, lost):.6f}", "censorship": str(int(death > lost)), "patient": f"p{i}"}
            rows.append({"key": f"p{i}s{slide}", "caption": "", **fields})
            x.append(np.concatenate([[2 * hidden], rng.normal(size=7)]))
    for row, values in changes.pop("rows", {}).items():
        rows[row] |= values
    image = np.array(x, dtype=np.float16)
    valid = np.full(len(rows), 1, dtype=np.uint8)
    valid[0] = 0
    names = ("months", "censorship", "patient")
    store_of(folder / "store", rows, names, {"alpha": ShardFeatures(image, image * np.nan, valid)})
    mil = {"epochs": 10, "patience": 10, "lr": 2e-2, "hidden": 16, "attention": 8, "batch": 32, "dropout": 0.0}
    content = {
        "suite": "cohort", "store": "store", "bootstrap": {"n": 200},
        "settings": {"survival": {"folds": 3, "seeds": 1, "mil": mil}},
        "datasets": [{
            "dataset": "kidney", "group": "patient", "rows": {"test": {}}, "tasks": ["survival"],
            "survival": {"time": "months", "event": {"censorship": "0"}},
        } | changes],
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"
