"""Stores whose features hold a class and a hospital with known strengths, and a suite over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from planted_store import store_of

from mmkd.store.writer import ShardFeatures

DIM = 24


def hospitals(
    folder: Path,
    strengths: dict[str, tuple[float, float]],
    *,
    patients: int = 48,
    each: int = 6,
    sites: int = 3,
    classes: int = 2,
    seed: int = 0,
    changes: dict[int, dict[str, Any]] | None = None,
    **dataset: Any,
) -> Path:
    """Patients of one site each with rows of all classes in turn; encoders by (strength of the class, of the site)."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(patients * each):
        patient = i // each
        row = {"key": f"r{i}", "tissue": f"t{i % classes}", "hospital": f"h{patient % sites}", "patient": f"p{patient}"}
        rows.append(row | {"constant": "one", "copy": f"c{i % classes}"} | (changes or {}).get(i, {}))
    directions = [np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:n] for n in (classes, sites)]
    own, noise = rng.normal(size=(patients, DIM)), rng.normal(size=(len(rows), DIM))
    features = {}
    for slug, (biology, site) in strengths.items():
        image = biology * directions[0][np.arange(len(rows)) % classes]
        image = image + site * directions[1][np.arange(len(rows)) // each % sites]
        image = (image + 0.15 * own[np.arange(len(rows)) // each] + 0.2 * noise).astype(np.float16)
        features[slug] = ShardFeatures(image, image, np.full(len(rows), 1, dtype=np.uint8))
    store_of(folder / "store", rows, ("tissue", "hospital", "patient", "constant", "copy"), features)
    content = {
        "suite": "hospitals", "store": "store", "bootstrap": {"n": 200},
        "datasets": [{"dataset": "slides", "label": "tissue", "group": "patient", "rows": {"test": {}},
                      "tasks": ["retrieval"]} | dataset],
    }  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(content))
    return folder / "suite.yaml"
