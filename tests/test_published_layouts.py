"""Every description that comes with mmkd meets a miniature of its set: rows, classes and splits are those of the
release, and a description that is wrong is found out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from published_layouts import LAYOUTS, Counts, build

from mmkd.base.config import SUITES
from mmkd.base.errors import MmkdError
from mmkd.evaluate.check import DatasetCheck, check_suite
from mmkd.evaluate.suite import load_suite
from mmkd.extract.corpora import open_corpus
from mmkd.extract.index import create_indexed_store

DESCRIPTIONS = {path.stem: path for path in sorted((SUITES / "biomed" / "datasets").glob("*.yaml"))}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `${data}`."""
    (tmp_path / "roots.yaml").write_text("data: data\nstores: stores\n")
    monkeypatch.setenv("MMKD_ROOTS", str(tmp_path / "roots.yaml"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def checked(description: Path, data: Path) -> DatasetCheck:
    """The check of one description whose set lies below `data`, after its files were listed into a store."""
    store = data.parent / "store"
    create_indexed_store(open_corpus(str(description)), store)
    suite = data.parent / "suite.yaml"
    suite.write_text(yaml.safe_dump({"suite": "one", "store": str(store), "datasets": [str(description)]}))
    (found,) = check_suite(load_suite(suite)).datasets
    return found


def counts(found: DatasetCheck, like: Counts) -> Counts:
    """What a check found, in the terms of `like`: classes, positives of a label, rows or groups."""
    by_split: Counts = {}
    for split in found.rows:
        words = like.get(split) or like.get("all") or {}
        classes = found.counts.get(f"{split} rows by class")
        labels = {
            name: n["positive"] for name in words if (n := found.counts.get(f"{split} {name}")) and "positive" in n
        }
        sizes = {"rows": found.rows[split], "groups": found.groups[split]}
        by_split[split] = classes or labels or {word: sizes[word] for word in words if word in sizes}
    if "all" not in like:
        return by_split
    assert set(by_split) == {"train", "val", "test"}
    return {"all": dict(sum(map(Counter, by_split.values()), Counter()))}


def test_every_description_has_a_miniature() -> None:
    assert set(LAYOUTS) == set(DESCRIPTIONS)


@pytest.mark.integration
@pytest.mark.parametrize("name", LAYOUTS)
def test_check_finds_rows_classes_and_splits_of_the_release(data: Path, name: str) -> None:
    layout = LAYOUTS[name]
    build(layout, data)
    found = checked(DESCRIPTIONS[name], data)
    assert counts(found, layout.finds) == layout.finds
    unread = [f"{name}: no test row has both an image and a caption"] if "retrieval" in found.tasks else []
    assert found.problems == unread
    # A miniature is smaller than the release, so each published number is told to differ.
    published = yaml.safe_load(DESCRIPTIONS[name].read_text())["about"]["expected"]
    told = [text for text in found.warnings if "published are" in text]
    assert len(told) == sum(count is not None for count in published.values())


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("chest-xray-pneumonia", "  splits: {train: train, val: val, test: test}\n", ""),
        ("oct2017", "OCT2017 '", "OCT2017'"),
        ("sars-cov-2-ct", "non-COVID", "NonCOVID"),
        ("ham10000", "HAM10000_metadata", "HAM10000_metadata.csv"),
        ("vqa-rad", "VQA_RAD Dataset Public.json", "VQA_RAD.json"),
        ("vqa-rad", "test_para", "test_paraphrase"),
        ("lc25000-lung", "lung_scc", "lung_squamous"),
        ("octmnist", "drusen: '2'", "drusen: '4'"),
        ("tcga-kirc", "key: case_id", "key: patient"),
        ("camelyon17-wilds", "center: '2'", "center: '5'"),
        ("hyperkvasir", "match: name", "match: stem"),
        ("fetal-planes", "Train: '1'", "Train: '2'"),
        ("derm7pt", ", melanoma metastasis", ""),
        ("busi", "only: ['*).png']", "only: ['*.png']"),
        ("rsna-pneumonia", "key: patientId", "key: patientid"),
        ("nih-chestxray14", "Pleural_Thickening", "Pleural Thickening"),
    ],
)
def test_a_wrong_description_is_found_out(data: Path, name: str, right: str, wrong: str) -> None:
    text = DESCRIPTIONS[name].read_text()
    assert right in text
    text = text.replace(right, wrong)
    description = data.parent / "datasets" / f"{name}.yaml"
    description.parent.mkdir()
    description.write_text(text.replace("../prompts/", f"{SUITES}/biomed/prompts/"))
    build(LAYOUTS[name], data)
    try:
        found = checked(description, data)
    except MmkdError:
        return
    assert counts(found, LAYOUTS[name].finds) != LAYOUTS[name].finds or found.problems
