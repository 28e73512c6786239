"""What a user can get wrong about a selection is answered in one line, and nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from planted_store import make_planted

from mmkd.base.errors import (
    ConfigError,
    CorruptStoreError,
    FormatVersionError,
    IncompleteStoreError,
    MmkdError,
    StoreError,
    TeacherMismatchError,
    UserError,
)
from mmkd.cli.select import select as select_command
from mmkd.store import FeatureStore
from mmkd.store.chunk import encode_chunk
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.rows import StoreRows, chosen_rows
from mmkd.store.layout import ledger_entry
from mmkd.store.selection import SelectionRule, load_rule, select

HALF: dict[str, Any] = {"cosine": {"at_least": 0.5}}


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Two encoders on 366 rows with modalities."""
    modality = {i: {"modality": ("CT", "MRI")[i % 2]} for i in range(366)}
    return FeatureStore.open(make_planted(tmp_path, {"far": 2.0, "near": 0.3}, changes=modality).root)


def run(store: FeatureStore, keep: dict[str, Any], **rest: Any) -> None:
    """Select with a rule."""
    select(store, "s", SelectionRule.model_validate({"keep": keep} | rest))


@pytest.mark.parametrize(
    ("keep", "complaint"),
    [
        ({"cosine": {"at_least": 1.5}}, "keeps none of 720 pairs, .* alone keeps 0; loosen it"),
        ({"all": [{"where": "modality = 'CT'"}, {"where": "modality = 'MRI'"}]}, "keeps none of 720 pairs"),
        ({"where": "modality = 'XR'"}, "no row of .* fits"),
        ({"where": "modalty = 'CT'"}, "did you mean 'modality'"),
        ({"home": {"teachers": {"near": ["CTT"]}}}, "no row of column 'modality' is 'CTT'; did you mean 'CT'"),
        ({"home": {"teachers": {"nearr": ["CT"]}}}, "has no teacher 'nearr'; it has far, near"),
        ({"home": {"teachers": {"near": ["CT"]}, "column": "organ"}}, "no sample column 'organ'"),
        ({"cosine": {"at_least": {"far": 0.1}}}, "no value for near; add them, or `others`"),
        ({"cosine": {"at_least": {"far": 0.1, "neaar": 0.2, "others": 0.3}}}, "did you mean 'near'"),
        ({"rank": {"at_most": 3, "among": 1024}}, "needs 1024 rows with all features, there are 360; lower `among`"),
        ({"pairs": {"of": HALF, "target": 5000}}, "5,000 are wanted, the rule below leaves"),
        ({"agreement": {"at_least": 0.2, "among": 400}}, "needs 400 rows"),
    ],
)
def test_a_rule_that_does_not_fit_the_store(store: FeatureStore, keep: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        run(store, keep)
    assert "\n" not in str(caught.value)
    assert not (store.root / "selections").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"keep": {"cosin": {"at_least": 0.5}}}, "keep.cosin: unknown key; did you mean 'cosine'"),
        ({"keep": {"all": [{"rank": {"at_mos": 3}}]}}, "keep.all.0.rank.at_mos: unknown key; did you mean 'at_most'"),
        ({"keep": {"cosine": {}}}, "exactly one of at_least, quantile"),
        ({"keep": {"cosine": {"at_least": 0.1, "quantile": 0.2}}}, "exactly one of at_least, quantile"),
        ({"keep": HALF | {"rank": {"at_most": 1}}}, "has cosine, rank, expected exactly one of"),
        ({"keep": {}}, "has none, expected exactly one of"),
        ({"keep": {"rank": {"at_most": 300}}}, "holds for every pair"),
        ({"keep": {"agreement": {"at_least": 0.1, "k": 50, "among": 50}}}, "every row is a neighbor"),
        ({"keep": {"pairs": {}}}, "either target"),
        ({"keep": {"teachers": {"of": HALF, "at_least": 3, "at_most": 2}}}, "at_most 2 is below at_least 3"),
        ({"kep": HALF}, "kep: unknown key; did you mean 'keep'"),
    ],
)
def test_a_rule_that_cannot_be_read(tmp_path: Path, content: dict[str, Any], complaint: str) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_rule(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value)


def test_a_rule_that_keeps_everything_is_said_to(store: FeatureStore) -> None:
    report = select(store, "all", SelectionRule.model_validate({"keep": {"cosine": {"at_least": -1}}}))
    assert report.warnings == ("the rule keeps every available pair: training with it is training without a selection",)


def test_a_name_that_is_taken_or_cannot_be_one(store: FeatureStore) -> None:
    run(store, HALF)
    before = store.available("s")
    with pytest.raises(UserError, match="has a selection 's' already; choose another --name"):
        run(store, {"cosine": {"at_least": 0.9}})
    assert np.array_equal(store.available("s"), before)
    for name in ("../x", "A", ".x", "a/b", ""):
        with pytest.raises(UserError, match="cannot be a folder name"):
            select(store, name, SelectionRule.model_validate({"keep": HALF}))
    with pytest.raises(UserError, match="has no selection 't'; it has s"):
        store.available("t")
    with pytest.raises(UserError, match=r"has no selection '\.\./\.\./etc'"):
        store.available("../../etc")


def test_a_teacher_that_is_missing_in_some_shards(store: FeatureStore) -> None:
    (store.root / ledger_entry(1, "far")).unlink()
    opened = FeatureStore.open(store.root)
    with pytest.raises(IncompleteStoreError, match=r"far is missing in 1 of 2 shards \(1\); finish `mmkd extract`, or"):
        run(opened, HALF)
    run(opened, HALF, teachers=["near"])
    with pytest.raises(UserError, match="no teacher 'nowhere'"):
        select(opened, "t", SelectionRule.model_validate({"keep": HALF, "teachers": ["nowhere"]}))
    assert not opened.available("s")[:, 0].any()


def test_prompts_that_do_not_fit(store: FeatureStore, tmp_path: Path) -> None:
    def zero_shot(folder: Path, label: str) -> dict[str, Any]:
        return {"zero_shot": {"prompts": str(folder), "label": label}}

    with pytest.raises(StoreError, match="is not an mmkd store"):
        run(store, zero_shot(tmp_path / "nowhere", "label"))
    strange = make_planted(tmp_path / "b", {"far": 2.0, "near": 0.3}, changes={360: {"modality": "PET"}}).root
    with pytest.raises(ConfigError, match="has prompts for PET; two labels or more must have prompts"):
        run(store, zero_shot(strange, "modality"))
    rows = chosen_rows(store, keys=("prompt-benign0",))
    import_features(StoreRows([(store, rows)]), tmp_path / "one", "float16", lambda done, every: None)
    with pytest.raises(ConfigError, match="has prompts for 1 labels"):
        run(store, zero_shot(tmp_path / "one", "label"))
    other = make_planted(tmp_path / "c", {"far": 2.5, "near": 0.3}).root
    with pytest.raises(TeacherMismatchError, match=r"teacher far has digest .* with the same weights"):
        run(store, zero_shot(other, "label"))


def test_a_selection_of_other_features_or_rows_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    run(store, HALF)
    folder = store.root / "selections" / "s"
    whole = (folder / "c/0/0").read_bytes()
    (folder / "c/0/0").write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(CorruptStoreError, match="CRC32C"):
        store.available("s")
    other = np.frombuffer(whole[:-4], np.uint8) ^ 1  # sound by itself, but of other pairs
    (folder / "c/0/0").write_bytes(encode_chunk(other)[0])
    with pytest.raises(CorruptStoreError, match="is not what was written"):
        store.available("s")
    (folder / "c/0/0").write_bytes(whole)
    (folder / "c/0/0").rename(folder / "c/0/x")
    with pytest.raises(CorruptStoreError, match="cannot be read"):
        store.available("s")
    (folder / "c/0/x").rename(folder / "c/0/0")
    document = json.loads((folder / "zarr.json").read_text())
    document["attributes"]["mmkd"]["rows"] = 12
    (folder / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(CorruptStoreError, match="was changed after it was written"):
        store.available("s")
    document["attributes"]["mmkd"]["format"] = 2
    (folder / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(FormatVersionError, match="selection format 2"):
        store.available("s")
    select(store, "t", SelectionRule.model_validate({"keep": HALF}))
    other = make_planted(tmp_path / "b", {"far": 2.5, "near": 0.3}).root
    (other / "selections").mkdir()
    (store.root / "selections" / "t").rename(other / "selections" / "t")
    with pytest.raises(TeacherMismatchError, match="judged teacher far of digest"):
        FeatureStore.open(other).available("t")


def test_features_are_not_touched_and_verify_stays_content(store: FeatureStore) -> None:
    def everything() -> dict[str, tuple[int, bytes]]:
        files = (path for path in store.root.rglob("*") if path.is_file() and "selections" not in path.parts)
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = everything()
    run(store, HALF)
    assert everything() == before
    report = store.verify(deep=True)
    assert report.sound
    assert report.orphans == ()


def test_the_command(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"keep": {"rank": {"at_most": 3, "among": 64}}}))
    runner = CliRunner()
    done = runner.invoke(select_command, [str(store.root), "--name", "r", "--rule", str(tmp_path / "r.yaml")])
    assert done.exit_code == 0, done.output
    for part in (
        "of 720 pairs kept",
        "without any teacher",
        "MRI",
        "near the threshold of rank",
        "dropped",
        "digest",
    ):
        assert part in done.output
    done = runner.invoke(select_command, [str(store.root), "--name", "c", "--rule", "cosine_fifth", "--json"])
    content = json.loads(done.stdout)
    assert content["counts"]["pairs"] == {"available": 720, "kept": 576}
    assert len(next(iter(content["examples"].values()))) == 6
    for arguments, complaint in (
        (["--name", "r", "--rule", "cosine_fifth"], "already"),
        (["--name", "x", "--rule", "cosine_fith"], "neither a file nor one of agreement"),
        (["--name", "x", "--rule", "cosine_fifth", "--by", "organ"], "no sample column 'organ'"),
    ):
        done = runner.invoke(select_command, [str(store.root), *arguments])
        assert isinstance(done.exception, MmkdError)
        assert complaint in str(done.exception)
