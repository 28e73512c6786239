"""A described set from its files to its scores: check, extract, check, run; and suites that are held in part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from planted_store import make_planted
from tiny_corpus import png
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import ConfigError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite
from mmkd.evaluate.dataset import load_dataset
from mmkd.extract.cluster_config import ClusterConfig
from mmkd.extract.config import ExtractConfig
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers
from mmkd.store import FeatureStore

PROMPTS = {"templates": ["a scan with {}", "{}"], "classes": {"tumour": ["a mass"], "none": ["nothing"]}}
BRAIN: dict[str, Any] = {
    "dataset": "brain",
    "modality": "mri",
    "about": {"homepage": "https://example.org/brain", "licence": "CC0-1.0", "expected": {"train": 8, "test": 5}},
    "source": {"kind": "imagefolder", "path": "${data}/brain", "splits": {"train": "A", "test": "B"}},
    "label": "label",
    "classes": {"tumour": "yes", "none": ["no", "normal"]},
    "prompts": {"file": "brain-prompts.yaml"},
    "rows": {"train": {"split": "train"}, "test": {"split": "test"}},
    "tasks": ["zero_shot", "linear_probe"],
}
SUITE: dict[str, Any] = {
    "suite": "held",
    "store": "${stores}/${dataset}",
    "bootstrap": {"n": 100},
    "settings": {"linear_probe": {"fractions": [1], "c_steps": 2}},
    "datasets": ["sets/brain.yaml"],
}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite with one described set whose images are not there yet."""
    (tmp_path / "sets").mkdir()
    (tmp_path / "roots.yaml").write_text("data: data\nstores: stores\n")
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    (tmp_path / "sets" / "brain.yaml").write_text(yaml.safe_dump(BRAIN, sort_keys=False))
    (tmp_path / "sets" / "brain-prompts.yaml").write_text(yaml.safe_dump(PROMPTS, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MMKD_ROOTS", raising=False)
    return tmp_path


def write_images(folder: Path) -> None:
    names = [f"A/{label}/{i}.png" for label in ("yes", "no") for i in range(4)]
    names += ["B/yes/4.png", "B/yes/5.png", "B/no/4.png", "B/normal/5.png"]
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))


@pytest.mark.integration
def test_from_nothing_to_scores(folder: Path) -> None:
    nothing = json.loads(invoke("check", "suite.yaml", "--json").output)["datasets"][0]
    assert nothing["problems"] == [f"its files are not here: {folder}/data/brain does not exist"]
    command = f"mmkd extract {folder}/sets/brain.yaml {folder}/stores/brain --teachers ..."
    assert nothing["steps"] == [
        "get it from https://example.org/brain (licence: CC0-1.0), or say where it is in roots.yaml",
        command,
    ]
    write_images(folder / "data" / "brain")
    there = invoke("check", "suite.yaml")
    assert there.exit_code == 1
    assert "suite held: 0 of 1 data sets ready, models none" in there.output
    assert "brain [report, mri: zero_shot, linear_probe]: not extracted" in there.output
    assert f"problem: not extracted: {folder}/stores/brain does not exist\n  next: {command}" in there.output
    teacher = write_tiny_teacher(folder / "teacher", seed=1)
    _, _, corpus, store, *_ = command.split()
    assert command.split()[:2] == ["mmkd", "extract"]
    named = tuple(parse_teachers(f"tiny=local-dir:{teacher}"))
    one = ClusterConfig(workers=1)
    extract(ExtractConfig(corpus=corpus, store=Path(store), teachers=named, cluster=one))
    ready = invoke("check", "suite.yaml")
    assert ready.output == (
        "suite held: 1 of 1 data sets ready, models tiny\n"
        "brain [report, mri: zero_shot, linear_probe]: train 8 (8 groups), test 4 (4 groups)\n"
        "  train rows by class: tumour 4, none 4\n"
        "  test rows by class: tumour 2, none 2\n"
        "  warning: test has 4 rows, published are 5\n"
    )
    assert ready.exit_code == 0
    spec = load_suite("suite.yaml").datasets[0]
    data = load_dataset(spec, FeatureStore.open(store))
    assert data.classes == ("tumour", "none")
    assert dict(zip(data.split("test").ids, data.labels(data.split("test")).tolist(), strict=True)) == {
        "test/B/no/4.png": 1, "test/B/normal/5.png": 1, "test/B/yes/4.png": 0, "test/B/yes/5.png": 0,
    }  # fmt: skip
    captions = data.texts["prompt"].column("caption").tolist()
    assert captions == [
        "a scan with a mass",
        "a mass",
        "a scan with nothing",
        "nothing",
    ]
    assert data.prompt_labels().tolist() == [0, 0, 1, 1]
    ran = invoke("run", "suite.yaml")
    assert ran.output == "2 units: 2 run, 0 done before, 0 failed; results in suite-results\n"
    # Neither where the description lies nor what it says of the source is in the numbers.
    changed = BRAIN | {"about": {"licence": "other"}, "notes": "read again"}
    (folder / "sets" / "brain.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    assert "2 done before" in invoke("run", "suite.yaml").output
    # Prompts that were edited after extraction are noticed.
    edited = PROMPTS | {"classes": {"tumour": ["a lump"], "none": ["nothing"]}}
    (folder / "sets" / "brain-prompts.yaml").write_text(yaml.safe_dump(edited, sort_keys=False))
    assert json.loads(invoke("check", "suite.yaml", "--json").output)["datasets"][0]["problems"] == [
        f"{folder}/sets/brain-prompts.yaml is not what was extracted into {folder}/stores/brain: prompt:tumour:0 is "
        "'a scan with a lump' in one of them only; extract the set into a new store"
    ]


def test_sets_that_are_not_held_are_left_out_and_counted(folder: Path) -> None:
    planted = make_planted(folder / "planted", {"a": 0.3, "b": 1.0})
    planted.edit(ensembles={}, dataset={"tasks": ["zero_shot", "linear_probe"]})
    raw = yaml.safe_load(planted.suite.read_text())
    raw["settings"] = {"linear_probe": {"fractions": [1], "c_steps": 2}}
    raw["datasets"] = [*raw["datasets"], "../sets/brain.yaml", "../sets/other.yaml"]
    (folder / "sets" / "brain.yaml").write_text(yaml.safe_dump(BRAIN | {"store": "${stores}/brain"}))
    other = BRAIN | {"dataset": "other", "store": "${stores}/other", "tasks": ["linear_probe"]}
    (folder / "sets" / "other.yaml").write_text(yaml.safe_dump(other))
    planted.suite.write_text(yaml.safe_dump(raw))
    ran = invoke("run", planted.suite, "--out", "out")
    assert ran.exit_code == 0, ran.output
    assert ran.output.endswith("results in out\n2 data sets are not extracted: brain, other; `check` says how\n")
    title = invoke("table", planted.suite, "--out", "out", "--task", "zero_shot").output.splitlines()[0]
    assert title.endswith("suite planted version 1; 1 of its 2 data sets with this task")
    assert "brain" not in invoke("table", planted.suite, "--out", "out").output
    nothing = invoke("run", folder / "suite.yaml")
    assert "is not an mmkd store: it does not exist" in str(nothing.exception)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": None}, "a prompt file is encoded with the `source`, which is missing"),
        ({"about": {"license": "x"}}, "about.license: unknown key; did you mean 'licence'"),
        ({"classes": {True: "yes"}}, "YAML reads a class name as True; put it in quotes"),
        ({"store": "${nowhere}/x"}, r"\$\{nowhere\} has no value; write `nowhere: FOLDER` into roots.yaml"),
    ],
)
def test_descriptions_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    (folder / "sets" / "brain.yaml").write_text(yaml.safe_dump(BRAIN | changes))
    with pytest.raises(ConfigError, match=message):
        load_suite("suite.yaml")


def test_a_described_set_has_a_file_of_its_own(folder: Path) -> None:
    (folder / "suite.yaml").write_text(yaml.safe_dump(SUITE | {"datasets": [BRAIN]}))
    with pytest.raises(ConfigError, match="brain has a `source`; write the data set into a file of its own"):
        load_suite("suite.yaml")
    with pytest.raises(ConfigError, match=r"cannot read bioned: no such file, and no suite of mmkd's \("):
        load_suite("bioned")
