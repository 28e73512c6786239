"""Clusters in YAML: what Dask users write is understood, what they misspell is named; TLS really encrypts."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from mmkd.base.errors import ConfigError, UserError
from mmkd.extract import cluster as extract_cluster
from mmkd.extract.cluster import ScopedClient, dask_client
from mmkd.extract.cluster_config import ClusterConfig, keywords_of, load_cluster


def write(folder: Path, content: dict[str, object]) -> str:
    """A YAML file; its path."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_names_and_addresses_need_no_file() -> None:
    assert load_cluster("local") == ClusterConfig()
    assert load_cluster("tcp://10.0.0.1:8786", 4).workers == 4
    assert load_cluster("slurm").batch_keywords() == {}
    for wrong, hint in (("slrum", "did you mean 'slurm'"), ("10.0.0.1:8786", "an address looks like tcp://HOST:8786")):
        with pytest.raises(ConfigError, match=hint):
            load_cluster(wrong)


def test_a_section_of_jobqueue_yaml_is_taken_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("dask_jobqueue", reason="an extra")
    # The section as dask-jobqueue ships it, every key of it.
    whole = yaml.safe_load((Path(sys.modules["dask_jobqueue"].__file__ or "").parent / "jobqueue.yaml").read_text())
    for name in ("slurm", "pbs", "sge"):
        section = whole["jobqueue"][name]
        path = write(tmp_path, {"scheduler": name, "workers": 3, "jobqueue": {name: section}})
        keywords = load_cluster(path).batch_keywords()
        assert keywords["worker_command"] == "distributed.cli.dask_worker"
        assert set(keywords) <= keywords_of(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"schedular": "local"}, "schedular: unknown key; did you mean 'scheduler'?"),
        ({"scheduler": "slurm", "jobqueue": {"slurm": {"que": "gpu"}}}, "jobqueue.slurm.que: .* did you mean 'queue'"),
        ({"jobqueue": {"slrum": {}}}, "jobqueue.slrum: unknown key; did you mean 'slurm'"),
        ({"distributed": {"scheduler": {"worker-til": "1m"}}}, r"distributed.scheduler.worker-til; .*'worker-ttl'"),
        ({"security": {"tls-ca-file": "ca.pem", "tls-cert": "c.pem"}}, "security.tls_key: Field required"),
        (
            {"security": {"tls-ca-file": "a", "tls-cert": "b", "tls-key": "c"}},
            "security.tls_ca_file: .* does not exist",
        ),
        ({"workers": 0}, "workers: Input should be greater than 0"),
        ({"worker": {"hang_second": 3}}, "worker.hang_second: unknown key; did you mean 'hang_seconds'"),
    ],
)
def test_what_is_misspelt_is_named(tmp_path: Path, content: dict[str, object], message: str) -> None:
    pytest.importorskip("dask_jobqueue", reason="an extra")
    with pytest.raises(ConfigError, match=message) as caught:
        load_cluster(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_dasks_own_settings_hold_for_the_run_only(tmp_path: Path) -> None:
    path = write(tmp_path, {"workers": 1, "distributed": {"scheduler": {"worker-ttl": "17 seconds"}}})
    before = dask.config.get("distributed.scheduler.worker-ttl")
    with dask_client(load_cluster(path)) as client:
        assert dask.config.get("distributed.scheduler.worker-ttl") == "17 seconds"
        ttl = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.worker_ttl)
        assert client.scheduler.address.startswith("tcp://127.0.0.1:")
        assert client.dashboard_link.startswith("http://127.0.0.1:")
    assert ttl == 17
    assert dask.config.get("distributed.scheduler.worker-ttl") == before


@pytest.mark.parametrize(("workers", "seen"), [(1, ["3"]), (None, ["3", "GPU-abc"]), (3, ["3", "3", "GPU-abc"])])
def test_each_process_sees_one_gpu(monkeypatch: pytest.MonkeyPatch, workers: int | None, seen: list[str]) -> None:
    monkeypatch.setattr(extract_cluster, "gpus", lambda: ["3", "GPU-abc"])
    monkeypatch.setitem(sys.modules, "dask_cuda", None)
    with dask_client(ClusterConfig(workers=workers)) as client:
        client.wait_for_workers(len(seen), timeout=60)
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == seen


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ca.pem, cert.pem and key.pem of one self-signed certificate."""
    x509 = pytest.importorskip("cryptography.x509", reason="makes the test's certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mmkd test")])
    now, day = datetime.now(UTC), timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    authority = x509.BasicConstraints(ca=True, path_length=None)
    certificate = builder.add_extension(authority, critical=True).sign(key, hashes.SHA256())
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (folder / "ca.pem").write_bytes(pem)
    (folder / "cert.pem").write_bytes(pem)
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return folder


@pytest.fixture
def tls_scheduler(tls: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a scheduler that speaks TLS only, in a process of its own, with one worker."""
    files = ["--tls-ca-file", tls / "ca.pem", "--tls-cert", tls / "cert.pem", "--tls-key", tls / "key.pem"]
    script = [sys.executable, "-P", "-m", "distributed.cli.dask_scheduler", "--host", "tls://127.0.0.1", "--port", "0"]
    where = tmp_path / "scheduler.json"
    command = [*script, "--no-dashboard", "--scheduler-file", str(where), *map(str, files)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        import json
        import time

        deadline = time.monotonic() + 60
        while not where.exists() or not where.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield json.loads(where.read_text())["address"]
    finally:
        process.kill()
        process.wait()


def test_tls_by_files_beside_the_yaml(tls: Path, tls_scheduler: str) -> None:
    assert tls_scheduler.startswith("tls://127.0.0.1:")
    files = {"tls-ca-file": "ca.pem", "tls-cert": "cert.pem", "tls-key": "key.pem"}
    cluster = load_cluster(write(tls, {"scheduler": tls_scheduler, "security": files}))
    with dask_client(cluster) as client:
        assert client.scheduler_info()["workers"] == {}
    for plain in (tls_scheduler, tls_scheduler.replace("tls://", "tcp://")):
        with pytest.raises(UserError, match="no Dask scheduler answers") as caught, dask_client(load_cluster(plain)):
            pass
        assert "\n" not in str(caught.value)


def test_a_client_that_could_not_connect_does_not_close_itself_when_it_is_collected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dask's own does, under a lock that the collecting thread may hold: the start of the next cluster then hung."""
    closed: list[object] = []
    monkeypatch.setattr(ScopedClient, "close", closed.append)
    with pytest.raises(UserError, match="no Dask scheduler answers"), dask_client(load_cluster("nowhere://x")):
        pass
    gc.collect()
    assert closed == []


def test_a_local_cluster_can_speak_tls_too(tls: Path) -> None:
    files = {"tls-ca-file": "ca.pem", "tls-cert": "cert.pem", "tls-key": "key.pem"}
    with dask_client(load_cluster(write(tls, {"workers": 1, "security": files}))) as client:
        assert client.scheduler.address.startswith("tls://127.0.0.1:")
        assert client.submit(sum, [1, 2]).result(timeout=60) == 3


@pytest.mark.parametrize(("worker", "threads"), [({}, 1), ({"shards_at_once": 3}, 3)])
def test_a_worker_takes_as_many_shards_at_once_as_are_set(
    worker: dict[str, int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def started(cluster: ClusterConfig, devices: list[str], options: dict[str, Any]) -> None:
        seen.append(options["threads_per_worker"])
        raise RuntimeError

    monkeypatch.setattr("mmkd.extract.cluster._local_cluster", started)
    monkeypatch.setattr("mmkd.extract.cluster.gpus", list)
    with pytest.raises(UserError, match="did not start"), dask_client(ClusterConfig.model_validate({"worker": worker})):
        pass
    assert seen == [threads]
