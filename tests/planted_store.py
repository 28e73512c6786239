"""A store whose features hold a known signal, with labels, patients, captions and prompts, and a suite over it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from mmkd.store.card import Preprocessing, TeacherCard
from mmkd.store.record import CorpusRecord
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, iter_shards, write_shard

LABELS = ("split", "label", "domain", "patient")
CLASSES = ("adenoma", "benign", "carcinoma")
DOMAINS = ("colon", "lung")
DIM = 16


def planted_rows(seed: int) -> list[dict[str, Any]]:
    """360 images (train, val, test; two a patient) and two prompts a class; captions name the class and a number."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for split, count in (("train", 200), ("val", 40), ("test", 120)):
        for i in range(count):
            rows.append(
                {
                    "key": f"{split}{i}",
                    "split": split,
                    "label": CLASSES[int(rng.integers(3))],
                    "domain": DOMAINS[i // 2 % 2],
                    "patient": f"{split}-p{i // 2}",
                    "uri": f"{split}{i}.png",
                    "image_sha256": hashlib.sha256(f"{split}{i}".encode()).hexdigest(),
                }
            )
            rows[-1]["caption"] = f"{rows[-1]['label']}, specimen {i}"
    for label in CLASSES:
        for k in "01":
            rows += [{"key": f"prompt-{label}{k}", "split": "prompt", "label": label, "caption": f"a {label} ({k})"}]
    return rows


def planted_features(rows: list[dict[str, Any]], noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image = class direction + own direction + noise; caption and prompts lie near the same directions."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(len(CLASSES), DIM))
    own = rng.normal(size=(len(rows), DIM)) * 0.8
    nowhere = np.zeros(DIM)  # of a class that no test should know
    centre = np.stack([direction[CLASSES.index(row["label"])] if row["label"] in CLASSES else nowhere for row in rows])
    is_prompt = np.array([row["split"] == "prompt" for row in rows])[:, None]
    pair = centre + np.where(is_prompt, 0.1 * own, own)
    image = pair + rng.normal(size=pair.shape) * noise
    text = pair + rng.normal(size=pair.shape) * noise * 0.5 * ~is_prompt
    return image.astype(np.float16), text.astype(np.float16)


@dataclass(frozen=True)
class Planted:
    """A store and the YAML of a suite over it."""

    root: Path
    suite: Path

    def edit(self, **changes: Any) -> None:
        """Change keys of the suite; `dataset` changes keys of its only data set."""
        raw = yaml.safe_load(self.suite.read_text())
        raw["datasets"][0] |= changes.pop("dataset", {})
        self.suite.write_text(yaml.safe_dump(raw | changes))


def store_of(
    root: Path,
    rows: list[dict[str, Any]],
    labels: tuple[str, ...],
    features: dict[str, ShardFeatures],
    weights: str | None = None,
) -> Path:
    """A store with these sample rows and, for each encoder, these features of all of them; images lie beside it.

    Encoders with other features have other weights, unless `weights` gives the same digest to all.
    """
    schema = sample_schema(labels)
    columns = {name: [row.get(name) for row in rows] for name in schema.names}
    columns |= {"row": list(range(len(rows))), "status": ["ok"] * len(rows)}
    beside = str(root.parent)
    corpus = CorpusRecord(kind="test", location="here", root=beside, rows=len(rows), labels=labels, digest="d")
    store = create_store(root, corpus, pa.table(columns, schema=schema))
    for slug, every in features.items():
        own = hashlib.sha256(every.image.tobytes()).hexdigest()
        card = TeacherCard(
            slug=slug, source="local-dir:/nowhere", weights_sha256=weights or own,
            preprocessing=Preprocessing(image_size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3),
            tokenizer_sha256="11", context_length=16, dim=every.image.shape[1],
        )  # fmt: skip
        add_teacher(store, card)
        for shard, span in enumerate(iter_shards(store.record)):
            part = slice(span.start, span.stop)
            shard_features = ShardFeatures(every.image[part], every.text[part], every.valid[part])
            write_shard(store, card, shard, shard_features, read_part(root, shard)[1])
    return root


def make_planted(
    folder: Path,
    models: dict[str, float],
    holes: dict[str, list[int]] | None = None,
    changes: dict[int, dict[str, Any]] | None = None,
) -> Planted:
    """Encoders by name and noise; `holes` are rows without features; `changes` are values of sample rows."""
    rows = planted_rows(seed=5)
    for row, values in (changes or {}).items():
        rows[row] |= values
    features = {}
    for i, (slug, noise) in enumerate(models.items()):
        image, text = planted_features(rows, noise, seed=i)
        valid = np.array([2 if row["split"] == "prompt" else 3 for row in rows], dtype=np.uint8)
        valid[(holes or {}).get(slug, [])] = 0
        features[slug] = ShardFeatures(image, text, valid)
    root = store_of(folder / "store", rows, LABELS, features)
    suite = folder / "suite.yaml"
    content = {
        "suite": "planted",
        "store": "store",
        "ensembles": {"both": list(models)[:2]},
        "bootstrap": {"n": 200},
        "settings": {"linear_probe": {"fractions": [0.1, 1.0], "seeds": 2, "c_low": 0.01, "c_high": 1e4, "c_steps": 7}},
        "datasets": [
            {
                "dataset": "specimens", "modality": "histopathology", "label": "label", "group": "patient",
                "domain": "domain", "rows": {name: {"split": name} for name in ("train", "val", "test")},
                "prompts": {"rows": {"split": "prompt"}}, "tasks": ["zero_shot", "linear_probe", "retrieval"],
            }
        ],
    }  # fmt: skip
    suite.write_text(yaml.safe_dump(content))
    return Planted(root, suite)
