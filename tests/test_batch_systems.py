"""PBS, SGE, dask-cuda and Kubernetes as far as they go without one: job scripts, commands and recipes, really run.

A stand-in for `qsub` runs the job script that dask-jobqueue hands it, as a batch system would.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from extract_scene import Scene, ended, kill_session, rows_done, started, wait_for

from mmkd.extract.cluster import _local_cluster, batch_cluster
from mmkd.extract.cluster_config import ClusterConfig, load_cluster

ROOT = Path(__file__).resolve().parents[1]
JOB = {"cores": 8, "processes": 1, "memory": "64GB", "walltime": "12:00:00", "interface": "lo"}

QSUB = """#!{python}
# Takes a job script, prints a number, and runs the script in a session of its own.
import os, subprocess, sys
from pathlib import Path
script = Path(sys.argv[-1]).read_text()
folder = Path({folder!r})
number = 1 + len(list(folder.glob("*.sh")))
path = folder / f"{{number}}.sh"
path.write_text(script)
out = (folder / f"{{number}}.out").open("w")
# Its own output: dask-jobqueue reads what qsub writes until nobody holds the pipe any more.
job = subprocess.Popen(["sh", path], start_new_session=True, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
(folder / f"{{number}}.pid").write_text(str(job.pid))
print(f"{{number}}.server" if {name!r} == "pbs" else f"Your job {{number}} (dask-worker) has been submitted")
"""
QDEL = """#!{python}
import os, signal, sys
from pathlib import Path
for number in sys.argv[1:]:
    try:
        os.killpg(int((Path({folder!r}) / (number.split(".")[0] + ".pid")).read_text()), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def cluster_file(folder: Path, **content: object) -> Path:
    """A cluster.yaml."""
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def script_of(folder: Path, name: str, **job: object) -> list[str]:
    """The lines of the job script that a worker of this batch system is sent with."""
    pytest.importorskip("dask_jobqueue", reason="an extra")
    path = cluster_file(folder, scheduler=name, workers=4, jobqueue={name: JOB | job})
    with batch_cluster(load_cluster(str(path))) as made:
        script: str = made.job_script()
    return script.splitlines()


def worker_options(lines: list[str]) -> dict[str, str]:
    """Options of the worker's command in a job script."""
    words = shlex.split(lines[-1])
    return {word: value for word, value in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


@pytest.mark.parametrize(
    ("name", "job", "directives"),
    [
        (
            "pbs",
            {"queue": "gpu", "account": "radiology", "resource-spec": "select=1:ncpus=8:ngpus=1:mem=64gb"},
            [
                "#PBS -q gpu",
                "#PBS -A radiology",
                "#PBS -l select=1:ncpus=8:ngpus=1:mem=64gb",
                "#PBS -l walltime=12:00:00",
            ],
        ),
        (
            "sge",
            {
                "queue": "gpu.q",
                "project": "radiology",
                "resource-spec": "h_vmem=64G",
                "job-extra-directives": ["-l gpu=1"],
            },
            ["#$ -q gpu.q", "#$ -P radiology", "#$ -l h_vmem=64G", "#$ -l h_rt=12:00:00", "#$ -l gpu=1"],
        ),
        (
            "slurm",
            {"queue": "gpu", "account": "radiology", "job-extra-directives": ["--gres=gpu:1"]},
            [
                "#SBATCH -p gpu",
                "#SBATCH -A radiology",
                "#SBATCH --cpus-per-task=8",
                "#SBATCH --mem=60G",
                "#SBATCH --gres=gpu:1",
            ],
        ),
    ],
)
def test_job_scripts_say_what_the_yaml_says(
    tmp_path: Path, name: str, job: dict[str, object], directives: list[str]
) -> None:
    prologue = ["source /shared/venv/bin/activate"]
    lines = script_of(tmp_path, name, **job, **{"job-script-prologue": prologue})
    assert set(directives) <= set(lines)
    assert prologue[0] in lines
    assert "-m distributed.cli.dask_worker tcp://127.0.0.1:" in lines[-1]
    # The last of two counts: the batch system holds a job to its memory, not Dask.
    assert lines[-1].rindex("--memory-limit 0") > lines[-1].index("--memory-limit")


def test_a_job_of_several_gpus_starts_dask_cuda(tmp_path: Path) -> None:
    lines = script_of(tmp_path, "slurm", **{"worker-command": "dask_cuda.cli", "processes": 4})
    assert "-m dask_cuda.cli tcp://127.0.0.1:" in lines[-1]
    # Every option is one that `python -m dask_cuda.cli` has (dask-cuda 26.10, dask_cuda/cli.py, worker); Dask's own
    # worker has more, which it would refuse.
    assert set(worker_options(lines)) <= {"--name", "--nthreads", "--memory-limit", "--death-timeout", "--interface"}


def test_dask_cuda_is_asked_for_one_worker_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the parameters that its class has (dask-cuda 26.10, dask_cuda/local_cuda_cluster.py); no GPU is here."""
    asked: dict[str, Any] = {}

    class LocalCUDACluster:
        def __init__(
            self,
            CUDA_VISIBLE_DEVICES: list[str] | None = None,
            n_workers: int | None = None,
            threads_per_worker: int = 1,
            memory_limit: object = "auto",
            **kwargs: object,
        ) -> None:
            # What it hands on to dask.distributed.LocalCluster beside its own values of these.
            assert not set(kwargs) & {"processes", "data", "local_directory", "protocol", "worker_class", "config"}
            asked.update(kwargs, devices=CUDA_VISIBLE_DEVICES, workers=n_workers, threads=threads_per_worker)
            asked["memory_limit"] = memory_limit

    module = types.ModuleType("dask_cuda")
    module.LocalCUDACluster = LocalCUDACluster  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_cuda", module)
    options = {"threads_per_worker": 2, "host": "127.0.0.1", "memory_limit": 0, "security": None}
    _local_cluster(ClusterConfig(), ["0", "GPU-abc"], options)
    assert asked == {
        "devices": ["0", "GPU-abc"],
        "workers": None,
        "threads": 2,
        "memory_limit": 0,
        "host": "127.0.0.1",
        "security": None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pbs", "sge"])
def test_an_extraction_by_jobs(scene: Scene, tmp_path: Path, name: str) -> None:
    """One job is cancelled in the middle; it is asked for anew, and nothing is left at the end."""
    pytest.importorskip("dask_jobqueue", reason="an extra")
    (tmp_path / "bin").mkdir()
    (tmp_path / "jobs").mkdir()
    for command, text in (("qsub", QSUB), ("qdel", QDEL)):
        path = tmp_path / "bin" / command
        path.write_text(text.format(python=sys.executable, folder=str(tmp_path / "jobs"), name=name))
        path.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    job = JOB | {"cores": 1, "death-timeout": 60, "log-directory": str(tmp_path / "jobs")}
    settings = {"deploy": {"lost-worker-timeout": "2s"}}
    path = cluster_file(tmp_path, scheduler=name, workers=2, jobqueue={name: job}, distributed=settings)
    store, log = tmp_path / "store", tmp_path / "log"
    run = started(scene.command(store, "--scheduler", path), log, env=environment)
    try:
        wait_for(lambda: rows_done(store) > 0, run, log)
        second = int((tmp_path / "jobs/2.pid").read_text())
        os.killpg(second, signal.SIGSTOP)  # there is work left until the new job has been asked for
        assert ended([str(tmp_path / "bin" / "qdel"), "1.server"]).returncode == 0
        try:
            wait_for((tmp_path / "jobs/3.pid").exists, run, log)
        finally:
            os.killpg(second, signal.SIGCONT)
        assert run.wait(timeout=600) == 0, log.read_text()
    finally:
        kill_session(run)
    assert scene.same(store)
    assert rows_done(store) <= 2048 + 256
    deadline = time.monotonic() + 10  # killed by the last qdel, but not yet buried by process 1
    while alive := [job for job in (tmp_path / "jobs").glob("*.pid") if Path("/proc", job.read_text()).exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.01)


def recipe() -> dict[str, Any]:
    """The DaskCluster of the documentation."""
    blocks = re.findall(r"```yaml[^\n]*\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    (found,) = [content for block in blocks if (content := yaml.safe_load(block)).get("kind") == "DaskCluster"]
    return dict(found)


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[str]:
    """The recipe's two containers as processes of this machine, with the environment that the operator gives them."""
    spec = recipe()["spec"]
    commands = {role: spec[role]["spec"]["containers"][0]["command"] for role in ("scheduler", "worker")}
    where = tmp_path / "scheduler.json"
    dask = [sys.executable, "-P", "-m", "dask"]
    assert commands["scheduler"][0] == commands["worker"][0] == "dask"
    local = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(where)]
    scheduler = started([*dask, *commands["scheduler"][1:], *local], tmp_path / "scheduler.log")
    try:
        wait_for(lambda: where.exists() and bool(where.read_text()), scheduler, tmp_path / "scheduler.log")
        address: str = json.loads(where.read_text())["address"]
        given = os.environ | {"DASK_SCHEDULER_ADDRESS": address, "DASK_WORKER_NAME": "extract-default-worker-1"}
        words = [re.sub(r"\$\((\w+)\)", lambda name: given[name[1]], str(word)) for word in commands["worker"][1:]]
        worker = started([*dask, *words, "--host", "127.0.0.1"], tmp_path / "worker.log", env=given)
        try:
            yield address
        finally:
            kill_session(worker)
    finally:
        kill_session(scheduler)


@pytest.mark.slow
def test_the_commands_of_the_recipe_extract(scene: Scene, tmp_path: Path, pods: str) -> None:
    store = tmp_path / "store"
    done = ended(scene.command(store, "--scheduler", pods))
    assert done.returncode == 0, done.stderr
    assert scene.same(store)
    workers = {
        json.loads(line)["worker"] for log in store.glob("runs/*.jsonl") for line in log.read_text().splitlines()
    }
    assert workers == {"extract-default-worker-1"}
