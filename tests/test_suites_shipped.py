"""The suites that come with mmkd: every description can be read by both stages, and says what it must."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mmkd.base.config import SUITES
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite
from mmkd.evaluate.dataset_spec import DatasetSpec
from mmkd.evaluate.suite import shipped_suites
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.store.evaluation_rows import read_prompts

# Those of the README of MMKD-CLIP.
NINE = {"x-ray", "fundus", "pathology", "endoscopy", "ct", "mri", "ultrasound", "dermatology", "oct"}
FILES = sorted((SUITES / "biomed" / "datasets").glob("*.yaml"))


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with roots for everything that is shipped, and nothing below them."""
    (tmp_path / "roots.yaml").write_text("data: data\nstores: stores\nquick: quick\n")
    monkeypatch.setenv("MMKD_ROOTS", str(tmp_path / "roots.yaml"))
    return tmp_path


def specs() -> tuple[DatasetSpec, ...]:
    return load_suite("biomed").datasets


def test_nine_modalities_and_all_tasks(roots: Path) -> None:
    assert shipped_suites() == ["biomed", "quick"]
    assert {spec.modality for spec in specs()} - {"radiology"} == NINE
    shipped = {task for spec in specs() for task in spec.tasks}
    assert shipped >= {"zero_shot", "linear_probe", "multilabel_zero_shot", "multilabel_probe"}
    assert shipped >= {"retrieval", "vqa", "survival", "diagnosis"}
    assert [spec.dataset for spec in specs()] == [path.stem for path in FILES]


def test_every_description_says_where_from_and_on_what_terms(roots: Path) -> None:
    for spec in specs():
        assert spec.role == "report", spec.dataset
        assert (spec.about.homepage or "").startswith("https://"), spec.dataset
        assert spec.about.licence or spec.notes or spec.about.access, spec.dataset
        assert set(spec.about.expected) <= {"train", "val", "test", "all"}, spec.dataset
        # What we do not know is null, and a note says why.
        if None in spec.about.expected.values() or not spec.about.expected:
            assert spec.notes, spec.dataset
        # What it was compared with, or that it was not; whom to cite; how to get the files.
        assert spec.about.layout is not None, spec.dataset
        assert spec.about.layout == "unconfirmed" or (spec.about.evidence or "").startswith("https://"), spec.dataset
        assert spec.about.citation, spec.dataset
        assert spec.about.fetch.files or spec.about.fetch.steps, spec.dataset


def test_prompts_describe_exactly_the_classes_in_their_order(roots: Path) -> None:
    described = [spec for spec in specs() if spec.prompts is not None]
    assert len(described) >= 25
    for spec in described:
        assert spec.prompts is not None
        assert spec.prompts.file is not None
        file = read_prompts(Path(spec.prompts.file))
        assert spec.classes is not None, spec.dataset
        assert set(file.classes) == set(spec.classes), spec.dataset
        if spec.multilabel is not None:
            assert set(file.negatives) == set(spec.classes), spec.dataset
        texts = [prompt.text for prompt in file.prompts()]
        assert len(set(texts)) == len(texts), spec.dataset
    used = {Path(spec.prompts.file).name for spec in described if spec.prompts and spec.prompts.file}
    assert {path.name for path in (SUITES / "biomed" / "prompts").glob("*.yaml")} == used


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_extraction_reads_every_source(roots: Path, path: Path) -> None:
    source = yaml.safe_load(path.read_text())["source"]
    place = Path(source["path"].replace("${data}", str(roots / "data")))
    if place.suffix:
        place.parent.mkdir(parents=True)
        place.touch()
    else:
        place.mkdir(parents=True)
    corpus = open_corpus(str(path))
    assert corpus.kind == f"evaluation set ({source['kind']})"


def test_check_names_every_set_and_its_next_step(roots: Path) -> None:
    result = CliRunner().invoke(evaluate, ["check", "biomed"])
    assert result.exit_code == 1
    assert result.output.startswith("suite biomed: 0 of 76 data sets ready, models none\n")
    assert result.output.count("  next: get it from https://") == 76
    assert result.output.count("  next: mmkd extract ") == 76
    assert result.output.count("; mmkd evaluate fetch ") == 76
    unconfirmed = [spec.dataset for spec in specs() if spec.about.layout == "unconfirmed"]
    assert unconfirmed == ["brain-tumor-mri", "isic2020", "kvasir", "pathvqa", "rocov2"]
    assert result.output.count("  layout: unconfirmed; compare file names and columns\n") == len(unconfirmed)


def test_quick_is_cut_from_installed_packages(roots: Path) -> None:
    from mmkd.demo.corpus import build_corpus
    from mmkd.demo.sources import SOURCES

    made = build_corpus(roots / "quick" / "corpus", train_per_class=2, test_per_class=1, sources=SOURCES[:3])
    spec = load_suite("quick").datasets[0]
    rows = list(corpus_rows(open_corpus(spec.described_in)))
    assert {row.labels["split"] for row in rows} == {"train", "test", "prompt"}
    assert len(rows) == made.train + made.test + made.prompts
    assert spec.role == "monitor"
    picture = next(row for row in rows if row.labels["split"] == "train")
    assert picture.uri is not None
    assert (roots / "quick" / "corpus" / picture.uri).is_file()
