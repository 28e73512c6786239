"""Other people's Dask configuration, and an output that nobody reads: one line with the true cause, or nothing."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import dask
import pytest
from distributed.comm import CommClosedError

from mmkd.base import install
from mmkd.base.errors import UserError
from mmkd.base.install import install_command
from mmkd.cli.doctor import _dask
from mmkd.extract import cluster
from mmkd.extract.cluster import dask_client, first_cause
from mmkd.extract.cluster_config import load_cluster
from mmkd.extract.preloads import try_preloads

FILES = {
    "broken YAML": ("distributed: [this is\n  not: yaml\n", "fault", "malformed"),
    "a string": ("hello\n", "fault", "dict as the top level"),
    "a level that logging does not know": ("distributed: {logging: {distributed: nolevel}}\n", "fault", "NOLEVEL"),
    "a list for a mapping": ("distributed: {logging: [a]}\n", "fault", "sequence"),
    "a variable that is not set": (
        'distributed: {dashboard: {link: "{JUPYTERHUB_SERVICE_PREFIX}/{port}"}}\n', "warning", "JUPYTERHUB",
    ),
    "a missing preload": ("distributed: {worker: {preload: [my_site]}}\n", "warning", "'my_site'"),
    "encryption": ("distributed: {comm: {require-encryption: true}}\n", "warning", "require-encryption"),
    "a preload that fails": ("distributed: {worker: {preload: [no-such-file.py]}}\n", "warning", "no-such-file.py"),
    "a broken link": ('distributed: {dashboard: {link: "{port"}}\n', "warning", "{port"),
    "a time that is none": ("distributed: {scheduler: {worker-ttl: never}}\n", "warning", "never"),
    "nothing odd": ("distributed: {}\n", "ok", "sound"),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("kind", FILES)
def test_doctor_looks_at_dasks_configuration(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, status, said = FILES[kind]
    (tmp_path / "user.yaml").write_text(content)
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path))
    found = _dask(60)
    assert found.status == status
    assert said in found.found


@pytest.mark.integration
@pytest.mark.parametrize(
    "kind", ["broken YAML", "a string", "a level that logging does not know", "a list for a mapping"]
)
def test_a_configuration_that_dask_cannot_read_is_one_line(kind: str, tmp_path: Path) -> None:
    (tmp_path / "user.yaml").write_text(FILES[kind][0])
    program = (
        "from mmkd.base.errors import ConfigError\n"
        "try:\n    import mmkd.extract.cluster_config\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    environment = os.environ | {"DASK_CONFIG": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert "Dask cannot read its configuration" in done.stdout
    assert done.stdout.count("\n") == 1


def test_the_first_cause_is_named() -> None:
    inner = ModuleNotFoundError("No module named 'my_site'")
    outer = RuntimeError("Nanny failed to start.")
    outer.__cause__ = inner
    assert first_cause(outer) == "ModuleNotFoundError: No module named 'my_site'"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (CommClosedError("gone"), True),
        (OSError("Timed out trying to connect to tcp://127.0.0.1:1"), True),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), True),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
    ],
)
def test_only_a_lost_connection_is_called_one(error: OSError, lost: bool) -> None:
    assert cluster._is_connection_loss(error) is lost


@pytest.mark.parametrize("scheduler", ["local", "tcp://127.0.0.1:1"])
def test_encryption_without_files_is_one_true_line(scheduler: str) -> None:
    with (
        dask.config.set({"distributed.comm.require-encryption": True}),
        pytest.raises(UserError, match=r"sets distributed\.comm\.require-encryption and names no TLS files"),
        dask_client(load_cluster(scheduler, 1)),
    ):
        pass


@pytest.mark.integration
def test_a_scheduler_does_not_end_before_the_run() -> None:
    with (
        dask.config.set({"distributed.scheduler.idle-timeout": "100ms"}),
        dask_client(load_cluster("local", 1)) as client,
    ):
        time.sleep(2)
        assert client.submit(int, "3").result(timeout=60) == 3


def test_a_cluster_that_does_not_start_names_the_users_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "never")
    with (
        dask.config.set({"distributed.scheduler.worker-ttl": "never"}),
        pytest.raises(UserError) as error,
        dask_client(load_cluster("local", 1)),
    ):
        pass
    assert "'never'; your Dask settings are " in str(error.value)
    assert "worker_ttl: 'never'; correct the YAML files in $DASK_CONFIG or ~/.config/dask" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_of_the_block_are_not_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        class scheduler:  # noqa: N801
            address = "inproc"

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(cluster, "_local_client", lambda _: Fake())
    with pytest.raises(BrokenPipeError), dask_client(load_cluster("local", 1)):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_long_command_goes_on_when_its_output_is_closed(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "import click\n"
        "from mmkd.cli import main as entry\n"
        "@click.command()\n"
        "@click.argument('folder')\n"
        "def work(folder):\n"
        "    for i in range(20000):\n        click.echo(f'line {i}')\n"
        "    pathlib.Path(folder, 'done').write_text('all')\n"
        "entry.cli = lambda: work.main(sys.argv[2:])\n"
        "entry.main()\n"
    )
    (tmp_path / "p.py").write_text(program)
    shell = f"{sys.executable} -P {tmp_path / 'p.py'} extract {tmp_path} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "line 0\n", "")
    assert (tmp_path / "done").read_text() == "all"


@pytest.mark.parametrize("command", ["extract", "teachers"])
def test_an_output_that_was_never_open_is_no_fault(command: str) -> None:
    program = f"{sys.executable} -P -c 'from mmkd.cli.main import main; main()' {command} --help >&-"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            {"url": "file:///home/me/my%20mmkd", "dir_info": {"editable": True}},
            "pip install -e '/home/me/my mmkd[wsi]'",
        ),
        ({"url": "file:///home/me/mmkd", "dir_info": {}}, "pip install '/home/me/mmkd[wsi]'"),
        ({"url": "file:///a/mmkd-1.whl", "archive_info": {}}, "pip install 'mmkd[wsi] @ file:///a/mmkd-1.whl'"),
        (
            {"url": "https://h/mmkd.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            "pip install 'mmkd[wsi] @ git+https://h/mmkd.git@ab12'",
        ),
        (None, "pip install 'WHEEL_OR_CHECKOUT[wsi]', with the place this mmkd was installed from"),
    ],
)
def test_extras_come_from_where_mmkd_came(
    origin: dict[str, object] | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def __init__(self, text: str | None) -> None:
            self.text = text

        def read_text(self, _: str) -> str | None:
            return self.text

    # The first is what a build leaves in a checkout, where Python may run.
    found = [Installed(None), Installed(None if origin is None else json.dumps(origin))]
    monkeypatch.setattr(install, "distributions", lambda name: found)
    assert install_command("wsi") == expected


PRELOADS = {
    "scheduler": (
        "import sys; sys.exit('my reason')",
        "ended with status 1 (my reason); correct the module, or the YAML",
    ),
    "nanny": ("raise KeyboardInterrupt", "was killed by SIGINT (KeyboardInterrupt)"),
    "client": ("import os; os._exit(7)", "ended with status 7; "),
    "worker": ("def dask_setup(worker):\n    raise SystemExit(4)", "(SystemExit: 4)"),
}


@pytest.mark.integration
@pytest.mark.parametrize("role", PRELOADS)
def test_a_preload_that_ends_its_process_is_one_line(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_site.py").write_text(PRELOADS[role][0])
    monkeypatch.syspath_prepend(tmp_path)
    with (
        dask.config.set({f"distributed.{role}.preload": ["my_site"]}),
        pytest.raises(UserError) as error,
        dask_client(load_cluster("local", 1)),
    ):
        pass
    assert PRELOADS[role][1] in str(error.value)
    assert f"Dask's distributed.{role}.preload: " in str(error.value)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_preload_that_waits_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_site.py").write_text("import time; time.sleep(1000)")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        dask.config.set({"distributed.client.preload": "my_site"}),
        pytest.raises(UserError, match=r"client\.preload: my_site did not end within 15 s; correct the module"),
    ):
        try_preloads("address", 15)


@pytest.mark.parametrize("named", [5, {"a": 1}, [["a"]]])
def test_a_preload_that_is_no_name_is_one_line(named: object) -> None:
    with (
        dask.config.set({"distributed.scheduler.preload": named}),
        pytest.raises(UserError, match=r"distributed.scheduler.preload is .*, expected module names"),
    ):
        try_preloads("batch")


@pytest.mark.integration
def test_a_setting_that_no_client_takes_is_one_line() -> None:
    with (
        dask.config.set({"distributed.client.heartbeat": "abc"}),
        pytest.raises(UserError, match=r"^no Dask client starts: KeyError: [^\n]*$"),
        dask_client(load_cluster("local", 1)),
    ):
        pass


@pytest.mark.parametrize(
    "content", ["distributed: {scheduler: 5}", "distributed: [a]", "distributed: {comm: {tls: yes}}"]
)
def test_a_value_for_a_section_is_one_line(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user.yaml").write_text(content)
    monkeypatch.setattr(dask.config, "paths", [str(tmp_path)])
    with (
        pytest.raises(UserError, match=r"^Dask's distributed[^\n]* is one value, expected a section[^\n]*$"),
        dask_client(load_cluster("local", 1)),
    ):
        pass
