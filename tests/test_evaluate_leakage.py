"""The leakage report finds copies that were planted, and no others."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from planted_store import store_of

from mmkd.base.errors import MmkdError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite
from mmkd.evaluate.leakage import ImageHashes, Overlap, Thresholds, as_signs, find_leakage, perceptual_hash
from mmkd.evaluate.neighbors import nearest_rows
from mmkd.store import FeatureStore
from mmkd.store.writer import ShardFeatures

DIM = 64


def make(root: Path, rows: list[dict[str, Any]], image: np.ndarray, weights: str = "11") -> Path:
    """A store of one encoder, the same in all stores with equal `weights`."""
    image = image.astype(np.float16)
    valid = np.full(len(rows), 3, dtype=np.uint8)
    return store_of(root, rows, ("split", "patient"), {"alpha": ShardFeatures(image, image, valid)}, weights)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A suite of 40 train and 30 test images (three a patient) and a training store, with planted copies.

    test0: bytes of train5. test1: nearly train6. test2: bytes of test10, another patient. test3: bytes of test4, the
    same patient. test6: nearly test12, another patient. test7: bytes of corpus3. test8: nearly corpus4. test9: the
    feature of a view of corpus9, which is no image of its own.
    """
    folder = tmp_path_factory.mktemp("leakage")
    rng = np.random.default_rng(0)
    train, test, corpus = (rng.normal(size=(n, DIM)) for n in (40, 30, 50))
    evaluated = [{"key": f"train{i}", "split": "train", "patient": f"a{i}"} for i in range(40)]
    evaluated += [{"key": f"test{i}", "split": "test", "patient": f"p{i // 3}"} for i in range(30)]
    learned = [{"key": f"corpus{i}", "split": "train", "patient": f"c{i}"} for i in range(50)]
    for rows in (evaluated, learned):
        for row in rows:
            row["image_sha256"] = hashlib.sha256(row["key"].encode()).hexdigest()
    evaluated[40]["image_sha256"], test[0] = evaluated[5]["image_sha256"], train[5]
    test[1] = train[6] + 0.05 * rng.normal(size=DIM)
    evaluated[42]["image_sha256"], test[2] = evaluated[50]["image_sha256"], test[10]
    evaluated[43]["image_sha256"], test[3] = evaluated[44]["image_sha256"], test[4]
    test[6] = test[12] * 3 + 0.05 * rng.normal(size=DIM)  # length does not matter, direction does
    evaluated[47]["image_sha256"], test[7] = learned[3]["image_sha256"], corpus[3]
    test[8] = corpus[4] + 0.05 * rng.normal(size=DIM)
    learned.append(learned[9] | {"key": "corpus9#views-1", "image_rows": [9], "view_number": 1})
    corpus = np.concatenate([corpus, test[9:10]])
    make(folder / "store", evaluated, np.concatenate([train, test]))
    make(folder / "training", learned, corpus)
    make(folder / "other-weights", learned, corpus, weights="22")
    suite = folder / "suite.yaml"
    spec = {
        "dataset": "set", "group": "patient", "tasks": ["retrieval"],
        "rows": {"train": {"split": "train"}, "test": {"split": "test"}},
    }  # fmt: skip
    suite.write_text(yaml.safe_dump({"suite": "leaky", "store": "store", "datasets": [spec]}))
    return suite, folder / "training"


def found(overlap: Overlap) -> set[tuple[str, str, str]]:
    return {(pair.kind, pair.key, pair.other) for pair in overlap.pairs}


def test_planted_copies_are_found_and_no_others(planted: tuple[Path, Path]) -> None:
    suite, training = planted
    report = find_leakage(load_suite(suite), FeatureStore.open(training))
    by_place = {one.against: one for one in report.overlaps}
    assert list(by_place) == ["training corpus", "train", "test"]
    assert found(by_place["training corpus"]) == {("exact", "test7", "corpus3"), ("features", "test8", "corpus4")}
    assert found(by_place["train"]) == {("exact", "test0", "train5"), ("features", "test1", "train6")}
    # test3 and test4 are equal too, but of one patient
    assert found(by_place["test"]) == {
        ("exact", "test2", "test10"), ("exact", "test10", "test2"),
        ("features", "test6", "test12"), ("features", "test12", "test6"),
    }  # fmt: skip
    assert not report.clean
    near = by_place["train"].features
    assert (by_place["train"].images, near.compared, near.found) == (30, 30, 1)
    assert near.typical is not None
    assert near.typical < 0.5
    assert near.nearest is not None
    assert 0.98 < near.nearest < 1
    strict = find_leakage(load_suite(suite), thresholds=Thresholds(cosine=1.0))
    assert [one.features.found for one in strict.overlaps] == [0, 0]
    assert {one.hash for one in report.overlaps} == {None}
    words = ["leakage", str(suite), "--cosine", "1.0", "--json"]
    said = json.loads(CliRunner().invoke(evaluate, words).output)["overlaps"]
    assert [(one["exact"], one["features"]["found"]) for one in said] == [(1, 0), (2, 0)]


def test_text_and_json_say_the_same(planted: tuple[Path, Path]) -> None:
    text = CliRunner().invoke(evaluate, ["leakage", str(planted[0])])
    assert text.exit_code == 0, text.output
    assert "set test in train: 1 exact, 1 near by features of 30 images\n" in text.output
    assert "  nearest neighbors, median and closest: cosine 0." in text.output
    assert "  exact: test0 = train5" in text.output
    assert "set test inside (other groups): 2 exact, 2 near by features of 30 images" in text.output
    assert "  ... and 1 more; --json lists all" in text.output
    corpus = CliRunner().invoke(evaluate, ["leakage", str(planted[0]), "--training", str(planted[1])])
    assert f"training corpus {planted[1]}" in corpus.output
    assert "set test in training corpus: 1 exact, 1 near by features of 30 images" in corpus.output
    content = json.loads(CliRunner().invoke(evaluate, ["leakage", str(planted[0]), "--json"]).output)
    assert [one["exact"] for one in content["overlaps"]] == [1, 2]
    assert len(content["overlaps"][1]["pairs"]) == 4
    assert (content["clean"], content["model"], content["training"]) == (False, "alpha", None)


def test_what_cannot_be_compared_is_said(planted: tuple[Path, Path]) -> None:
    suite, training = load_suite(planted[0]), FeatureStore.open(planted[1].with_name("other-weights"))
    with pytest.raises(MmkdError, match="alpha has different weights or preprocessing in the stores"):
        find_leakage(suite, training)
    asked = CliRunner().invoke(evaluate, ["leakage", str(planted[0]), "--model", "beta"])
    assert re.search(r"beta is not in all of .*; in all of them: alpha", str(asked.exception))
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(MmkdError, match="is no threshold; give one above 0 and up to 1"):
            Thresholds(cosine=wrong)
    for many in (-1, 32):
        with pytest.raises(MmkdError, match=f"{many} differing bits are no threshold"):
            Thresholds(bits=many)


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 7), st.integers(0, 99))
def test_nearest_in_blocks_is_the_argmax_of_the_whole_matrix(n: int, m: int, step: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, rows = (rng.integers(-2, 3, size=(k, 3)).astype(np.float32) for k in (n, m))  # small integers: many ties
    own, group = rng.integers(0, 4, n), rng.integers(0, 4, m)
    blocks = [(np.arange(m)[i : i + step], rows[i : i + step]) for i in range(0, m, step)]
    where, best = (one[:, 0] for one in nearest_rows(queries, blocks, 1, own, group))
    scores = np.where(own[:, None] == group, -np.inf, queries @ rows.T) if m else np.full((n, 1), -np.inf)
    assert best.tolist() == scores.max(axis=1).tolist()
    assert where.tolist() == np.where(scores.max(axis=1) > -np.inf, scores.argmax(axis=1), -1).tolist()


def scene(seed: int) -> Image.Image:
    """A picture like no other: smooth blobs."""
    noise = np.random.default_rng(seed).integers(0, 256, size=(120, 160), dtype=np.uint8)
    blurred = np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(8)), dtype=np.float64)
    return Image.fromarray(((blurred - blurred.min()) / np.ptp(blurred) * 255).astype(np.uint8))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of 12 train and 8 test images whose features are all unrelated; six test images hold something else.

    test0: train0 as JPEG. test1: train1 at half the size. test2: train2, brighter. test3: blank, as train3 is.
    test4: the file is gone. test5: the file was replaced by train5.
    """
    folder = tmp_path_factory.mktemp("pictures")
    train = [encoded(scene(i), "PNG") for i in range(12)]
    train[3] = encoded(Image.new("L", (64, 64), 7), "PNG")
    test = [encoded(scene(100 + i), "PNG") for i in range(8)]
    test[0] = encoded(scene(0), "JPEG", quality=30)
    test[1] = encoded(scene(1).resize((80, 60)), "PNG")
    test[2] = encoded(scene(2).point(lambda value: min(255, value * 1.2)), "PNG")
    test[3] = encoded(Image.new("RGB", (90, 50), (200, 9, 9)), "PNG")
    rows = []
    for split, images in (("train", train), ("test", test)):
        for i, data in enumerate(images):
            (folder / f"{split}{i}").write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            row = {"key": f"{split}{i}", "uri": f"{split}{i}", "split": split, "patient": f"{split}{i}"}
            rows.append(row | {"image_sha256": digest})
    (folder / "test4").unlink()
    (folder / "test5").write_bytes(train[5])
    make(folder / "store", rows, np.random.default_rng(0).normal(size=(20, DIM)))
    spec = {"dataset": "set", "tasks": ["retrieval"], "rows": {name: {"split": name} for name in ("train", "test")}}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"suite": "seen", "store": "store", "datasets": [spec]}))
    return folder


def test_copies_that_were_saved_scaled_or_brightened_are_found_by_hash(pictured: Path) -> None:
    kept = pictured / "hashes.parquet"
    arguments = ["leakage", str(pictured / "suite.yaml"), "--hashes", str(kept), "--json"]
    content = json.loads(CliRunner().invoke(evaluate, arguments).stdout)
    inside_train = content["overlaps"][0]
    assert {(pair["kind"], pair["key"], pair["other"]) for pair in inside_train["pairs"]} == {
        ("hash", f"test{i}", f"train{i}") for i in range(3)
    }
    assert max(pair["bits"] for pair in inside_train["pairs"]) <= 4
    # Without test3 (blank), test4 (gone) and test5 (another image than the one whose features are stored).
    assert (inside_train["hash"]["compared"], inside_train["hash"]["found"]) == (5, 3)
    assert content["overlaps"][1]["pairs"] == []
    assert content["overlaps"][1]["hash"]["typical"] > 15  # unrelated pictures differ in about half of the bits

    loose = find_leakage(load_suite(pictured / "suite.yaml"), None, None, Thresholds(bits=31), hashes(kept))
    assert loose.overlaps[0].hash is not None
    assert loose.overlaps[0].hash.found == 5
    assert json.loads(CliRunner().invoke(evaluate, [*arguments, "--bits", "31"]).stdout) == json.loads(loose.json())
    text = loose.text()
    assert "by perceptual hashes that differ in 31 of 64 bits or fewer" in text
    assert "  3 images have no hash: gone, changed, or of one color" in text


def hashes(file: Path, said: list[str] | None = None) -> ImageHashes:
    return ImageHashes(file, (said if said is not None else []).append)


def test_an_image_is_read_once(pictured: Path, tmp_path: Path) -> None:
    suite, said = load_suite(pictured / "suite.yaml"), []
    first = find_leakage(suite, hashes=hashes(tmp_path / "h.parquet", said))
    assert [line.split(" images")[0] for line in said] == ["reading 12", "reading 8"]
    said.clear()
    again = find_leakage(suite, hashes=hashes(tmp_path / "h.parquet", said))
    assert again == first
    assert [line.split(" images")[0] for line in said] == ["reading 2"]  # the two that were not there before
    (tmp_path / "h.parquet").write_bytes(b"no")
    with pytest.raises(MmkdError, match=r"h.parquet is no file of image hashes \(.*\); name another, or delete it"):
        hashes(tmp_path / "h.parquet")


def test_a_hash_is_the_signs_of_low_frequencies() -> None:
    """Computed again from the definition, with another transform of the same name."""
    from scipy.fft import dctn

    picture = scene(42)
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(grey, type=2)[:8, :8]
    expected = np.where(low > np.median(low), 1.0, -1.0).reshape(-1)
    value = perceptual_hash(picture)
    assert value is not None
    assert as_signs(np.array([value], dtype=np.uint64)).tolist() == [expected.tolist()]
    assert perceptual_hash(Image.new("L", (40, 40), 9)) is None
