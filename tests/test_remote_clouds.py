"""Stores behind `gs://` and `az://`, through the clients that users have.

Google has no emulator to be installed from a registry: `gcs_stand_in` answers as its XML API is documented. Azure's is
Azurite (`npm install azurite`), used where it is installed.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import gcs_stand_in
import numpy as np
import pytest
from tiny_store import make_card, make_store

from mmkd.base.errors import BusyStoreError, CorruptStoreError, NotAStoreError, UnreachableError
from mmkd.base.lock import LOCK_FILE, only_writer
from mmkd.base.places import connection
from mmkd.base.places.remote import RemotePath, as_root
from mmkd.store import FeatureStore
from mmkd.store.pull import pull
from mmkd.store.verify import verify

CARDS = [make_card("alpha", 8), make_card("beta", 16).with_encoding("int8")]
# Printed in Azurite's own documentation; every Azurite has it.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module", params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a bucket."""
    folder = tmp_path_factory.mktemp("cloud")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "gs":
            with gcs_stand_in.running(folder) as environment:
                for name, value in environment.items():
                    patch.setenv(name, value)
                yield "gs://bucket"
            return
        program = os.environ.get("MMKD_AZURITE") or shutil.which("azurite-blob")
        if program is None:
            pytest.skip("Azurite is not installed (npm install azurite; MMKD_AZURITE names azurite-blob)")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}/devstoreaccount1"
        command = [program, "--silent", "--skipApiVersionCheck", "--location", str(folder), "--blobPort", str(port)]
        server = subprocess.Popen(command)
        try:
            settings = {"AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1", "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY}
            for name, value in (settings | {"AZURE_STORAGE_ENDPOINT": url}).items():
                patch.setenv(name, value)
            _make_container(url, port)
            yield "az://bucket"
        finally:
            server.kill()
            server.wait()


def _make_container(url: str, port: int) -> None:
    """Once it listens; with a signed URL, as obstore has no call for it."""
    from azure_request import create_container

    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    create_container(url, "bucket", AZURITE_KEY)


@pytest.fixture
def root(cloud: str, request: pytest.FixtureRequest) -> RemotePath:
    connection.server.cache_clear()
    place = as_root(f"{cloud}/{request.function.__name__}/store")
    assert isinstance(place, RemotePath)
    return place


def test_a_store_is_written_read_verified_and_pulled(root: RemotePath, tmp_path: Path) -> None:
    make_store(root, 600, CARDS)
    make_store(tmp_path / "local", 600, CARDS)
    there, here = FeatureStore.open(str(root)), FeatureStore.open(tmp_path / "local")
    rows = np.array([0, 255, 256, 599, 3])
    for slug in ("alpha", "beta"):
        for tower in ("image", "text"):
            assert np.array_equal(getattr(there, tower)(slug)[rows], getattr(here, tower)(slug)[rows])
    assert there.sample_table().equals(here.sample_table())
    assert there.verify(deep=True).sound
    report = pull(there, tmp_path / "pulled", workers=4, progress=lambda *_: None)
    assert (report.rows, report.shards) == (600, 6)
    for path in (tmp_path / "local").rglob("c/**/*"):
        if path.is_file():
            assert (tmp_path / "pulled" / path.relative_to(tmp_path / "local")).read_bytes() == path.read_bytes()


def test_damage_is_named(root: RemotePath) -> None:
    make_store(root, 300, CARDS[:1])
    chunk = root / "teachers/alpha/image/loose/00001"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    (problem,) = verify(root).findings
    assert problem.file == "teachers/alpha/image/loose/00001"
    with pytest.raises(CorruptStoreError, match="CRC32C"):
        _ = FeatureStore.open(str(root)).image("alpha")[299]
    chunk.unlink()
    with pytest.raises(CorruptStoreError, match="is missing although the ledger vouches for it"):
        _ = FeatureStore.open(str(root)).image("alpha")[299]


def test_what_is_there_first_stays_and_one_writes(root: RemotePath) -> None:
    path = root / "a b/ü.json"
    assert path.create(b"first")
    assert not path.create(b"second")
    assert path.read_bytes() == b"first"
    assert [found.name for found in (root / "a b").iterdir()] == ["ü.json"]
    with only_writer(root, "mmkd extract"):
        (root / LOCK_FILE).stat()
        assert not (root / LOCK_FILE).create(b"x")
    assert not (root / LOCK_FILE).exists()


def test_a_second_writer_is_refused(root: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkd.base.lock.BEAT_SECONDS", 0.2)
    with (
        only_writer(root, "mmkd extract"),
        pytest.raises(BusyStoreError, match="`mmkd extract`"),
        only_writer(root, "x"),
    ):
        pass


def test_nothing_there_is_one_line(cloud: str, root: RemotePath) -> None:
    with pytest.raises(NotAStoreError, match="does not exist"):
        FeatureStore.open(str(root))
    if cloud.startswith("az"):
        with pytest.raises((NotAStoreError, UnreachableError)):
            FeatureStore.open("az://nobucket/store")
