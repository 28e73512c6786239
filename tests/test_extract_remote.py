"""`mmkd extract` into S3 through a real Dask cluster, and what int8 and float32 keep of the same features."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_corpus import write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.places.remote import StorePath, as_root
from mmkd.evaluate.features import Features
from mmkd.extract.cluster_config import ClusterConfig
from mmkd.extract.config import ExtractConfig
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers
from mmkd.store import FeatureStore
from mmkd.store.layout import Encoding
from mmkd.store.ledger import remove_entry

MMKD = [sys.executable, "-P", "-c", "from mmkd.cli.main import main; main()"]
ROWS = 512


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`mmkd extract CORPUS`, without the store; one image is damaged."""
    root = tmp_path_factory.mktemp("scene")
    table = write_table_corpus(root / "corpus", ROWS)
    (root / "corpus/images/7.png").write_bytes(b"no picture")
    teacher = write_tiny_teacher(root / "teacher", seed=1, embed_dim=48)
    return [*MMKD, "extract", "--teachers", f"tiny=local-dir:{teacher}", "--workers", "2", str(table)]


def extracted(command: list[str], *more: object) -> FeatureStore:
    done = subprocess.run([*command, *map(str, more)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return FeatureStore.open(str(more[0]))


def encoded(command: list[str], root: Path, encoding: Encoding) -> FeatureStore:
    """What the command does, with another encoding: an option of the Python surface."""
    teachers = tuple(parse_teachers(command[command.index("--teachers") + 1]))
    cluster = ClusterConfig(workers=1)
    extract(
        ExtractConfig(corpus=command[-1], store=root, teachers=teachers, encoding=encoding, cluster=cluster),
        say=lambda _: None,
    )
    return FeatureStore.open(root)


@pytest.fixture(scope="module")
def local(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return extracted(command, tmp_path_factory.mktemp("local") / "store")


def objects(root: StorePath) -> dict[str, bytes]:
    """All files but the run logs and the root group, which holds the time of creation."""
    named = {str(path)[len(str(root)) + 1 :]: path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in named.items() if name != "zarr.json" and name[:5] != "runs/"}


@pytest.mark.slow
def test_two_extractions_into_s3_give_the_bytes_of_the_disk(
    command: list[str], local: FeatureStore, s3_server: str
) -> None:
    first = extracted(command, "s3://shared/extracted/first")
    assert objects(first.root) == objects(local.root)
    assert objects(extracted(command, "s3://shared/extracted/second").root) == objects(local.root)
    assert first.verify(deep=True).sound
    assert first.summary().status == {"ok": ROWS - 1, "partial": 1}
    assert len(list((first.root / "runs").glob("*.jsonl"))) == 1


@pytest.mark.slow
def test_what_was_lost_in_s3_is_done_again_to_the_same_bytes(
    command: list[str], local: FeatureStore, s3_server: str
) -> None:
    root = as_root("s3://shared/extracted/resumed")
    extracted(command, root)
    remove_entry(root, 1, "tiny")
    assert np.isnan(FeatureStore.open(root).text("tiny")[256:]).all()
    extracted(command, root)
    assert objects(root) == objects(local.root)


@pytest.mark.slow
def test_no_bucket_is_one_line(command: list[str], s3_server: str) -> None:
    done = subprocess.run([*command, "s3://no-such-bucket/x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: s3://no-such-bucket/x")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_int8_and_float32_keep_the_same_features(command: list[str], local: FeatureStore, tmp_path: Path) -> None:
    exact, short = (encoded(command, tmp_path / encoding, encoding) for encoding in ("float32", "int8"))
    rows = np.arange(ROWS)
    for tower in ("image", "text"):
        full = np.asarray(getattr(exact, tower)("tiny"))
        assert np.array_equal(full.astype(np.float16), getattr(local, tower)("tiny"), equal_nan=True)
        assert np.array_equal(short.valid("tiny"), exact.valid("tiny"))
        sound = np.isfinite(full[:, 0])
        decoded = getattr(short, tower)("tiny")[sound]
        norms = np.linalg.norm(full[sound], axis=1) * np.linalg.norm(decoded, axis=1)
        errors = 1 - (full[sound].astype(np.float64) * decoded).sum(axis=1) / norms
        told = short.card("tiny").encoding_error
        assert told is not None
        assert told[tower].worst == pytest.approx(errors.max(), rel=0.02)
        assert told[tower].mean == pytest.approx(errors.mean(), rel=0.02)
        assert errors.max() < 1e-3
    left, right = Features(short, "tiny").images(rows), Features(exact, "tiny").images(rows)
    assert np.array_equal(left.available, right.available)
    assert ((left.values * right.values).sum(axis=1)[left.available] > 0.999).all()
    assert exact.verify(deep=True).sound
    assert short.verify(deep=True).sound
    assert len({store.card("tiny").digest for store in (local, exact, short)}) == 3
