"""`mmkd doctor`: every look on this machine, and each thing that can be wrong with one."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from mmkd.base.install import install_command
from mmkd.cli import doctor
from mmkd.cli.doctor import (
    Check,
    cache_folder,
    cached_bytes,
    disk_checks,
    extra_check,
    hub_check,
    machine_checks,
    missing_package,
    needed,
    teacher_checks,
)
from mmkd.cli.main import cli, main
from mmkd.extract.teachers.published import the_nine

QUICK = """
import json
print(json.dumps({"torch": "2.9.0", "built": "13.0", "bf16": True, "devices": [["NVIDIA H100", 85899345920]]}))
"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No hub, and an empty cache; gives the cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes the call and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def torch_check(monkeypatch: pytest.MonkeyPatch, program: str, seconds: float = 60) -> Check:
    monkeypatch.setattr(doctor, "_ASK_TORCH", program)
    return next(check for check in machine_checks(seconds) if check.name == "torch")


@pytest.mark.integration
def test_a_whole_look_at_this_machine(offline: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["doctor", str(tmp_path / "not" / "there" / "yet"), "--json"])
    assert done.exit_code == 0, done.output
    found = [Check(**line) for line in json.loads(done.stdout)]
    assert list(dict.fromkeys(check.part for check in found)) == [
        "machine", "packages", "hub", "teachers", "disk"
    ]  # fmt: skip
    by_name = {(check.part, check.name): check for check in found}
    import torch

    assert torch.__version__ in by_name["machine", "torch"].found
    assert f"zarr {__import__('zarr').__version__}" in by_name["packages", "core"].found
    assert [check.name for check in found if check.part == "teachers"] == [teacher.slug for teacher in the_nine()]
    assert all(f"license {teacher.license}" in by_name["teachers", teacher.slug].found for teacher in the_nine())
    assert not (tmp_path / "not").exists()


@pytest.mark.integration
def test_the_screen_has_a_line_each_and_the_next_step(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", QUICK)
    lines = CliRunner().invoke(cli, ["doctor"]).stdout.splitlines()
    assert "  ok       torch: 2.9.0 built for CUDA 13.0; NVIDIA H100 (80.0 GB), bf16 yes" in lines
    plip = next(place for place, line in enumerate(lines) if "plip: not in the cache" in line)
    assert lines[plip + 1] == "           next: fetched when it is first used, or: hf download vinid/plip"
    assert any("hf download --repo-type dataset axiong/pmc_oa" in line for line in lines)
    assert max(map(len, lines)) < 260


@pytest.mark.parametrize(
    ("program", "status", "text"),
    [
        ("import time; time.sleep(60)", "warning", "did not answer within 0.5 s"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "fault", "torchvision::nms"),
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "note", "stores can be read, not made"),
        ("import os; os._exit(3)", "fault", "ended without a word"),
    ],
)
def test_a_torch_that_hangs_or_is_broken(monkeypatch: pytest.MonkeyPatch, program: str, status: str, text: str) -> None:
    found = torch_check(monkeypatch, program, 0.5 if "sleep" in program else 60)
    assert found.status == status
    assert text in found.found
    assert found.next_step


def test_the_user_says_how_long_to_wait(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", "import time; time.sleep(60)")
    assert "did not answer within 1 s" in CliRunner().invoke(cli, ["doctor", "--timeout", "1"]).stdout


@pytest.mark.integration
def test_a_fault_is_exit_status_one(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ASK_TORCH", "raise RuntimeError('torchvision')")
    assert CliRunner().invoke(cli, ["doctor"]).exit_code == 1


def test_a_hub_that_never_answers_is_not_waited_for(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", silent)
    started = time.monotonic()
    found = hub_check(0.5)
    assert time.monotonic() - started < 5
    assert found.status == "warning"
    assert "cannot be reached" in found.found
    assert "HF_ENDPOINT" in found.next_step


def test_a_hub_that_answers_one_that_is_closed_and_one_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Silent(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
        assert (hub_check(5).status, hub_check(5).found) == ("ok", "answers (404)")
        httpd.shutdown()
    assert hub_check(5).status == "warning"
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.example")
    assert "no http(s) address" in hub_check(5).found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_check(5).status == "note"


def test_weights_in_the_cache_are_seen_and_measured(offline: Path) -> None:
    for kind, name in (("models", "vinid--plip"), ("datasets", "axiong--pmc_oa")):
        folder = offline / f"{kind}--{name}"
        (folder / "blobs").mkdir(parents=True)
        (folder / "blobs" / "abc").write_bytes(b"x" * 2048)
        (folder / "snapshots" / "rev").mkdir(parents=True)
        (folder / "snapshots" / "rev" / "model.safetensors").symlink_to(folder / "blobs" / "abc")
    assert cached_bytes("vinid/plip") == cached_bytes("datasets/axiong/pmc_oa") == 2048
    assert cached_bytes("vinid/other") == 0
    found = {check.name: check for check in teacher_checks()}
    assert found["plip"].status == "ok"
    assert found["plip"].found == "2.0 KB in the cache; license not stated"
    assert [name for name, check in found.items() if check.status == "ok"] == ["pmcclip", "plip"]
    assert "local-dir:/folder" in found["medclip"].next_step


def test_the_cache_is_where_huggingface_hub_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    assert cache_folder() == Path(HF_HUB_CACHE)
    monkeypatch.setenv("HF_HOME", "/somewhere")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    assert cache_folder() == Path("/somewhere/hub")


def test_packages_that_are_missing_or_too_old() -> None:
    old = extra_check("x", [Requirement("numpy>=999"), Requirement("click")])
    assert old.status == "warning"
    assert old.found.startswith("wrong version: numpy ")
    assert "(needs >=999)" in old.found
    assert old.next_step == install_command("x")
    missing = extra_check("x", [Requirement("no-such-package-1"), Requirement("numpy")])
    assert (missing.status, missing.found) == ("note", "not installed: no-such-package-1")
    assert extra_check("", [Requirement("no-such-package-1")]).status == "fault"


def test_an_extra_has_its_own_packages_and_those_of_the_extras_it_names() -> None:
    wanted = [
        Requirement(text)
        for text in ("numpy", "torch; extra == 'train'", "mmkd[train]; extra == 'all'", "dask; extra == 'all'",
                     "tomli; python_version < '3'")
    ]  # fmt: skip
    assert [one.name for one in needed(wanted, "")] == ["numpy"]
    assert [one.name for one in needed(wanted, "train")] == ["torch"]
    assert [one.name for one in needed(wanted, "all")] == ["dask", "torch"]


def test_little_room_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=3 * 1024**3))
    stores, weights, temporary = disk_checks(tmp_path, tmp_path / "a" / "b")
    assert {check.status for check in (stores, weights, temporary)} == {"warning"}
    assert stores.found == f"3.0 GB free in {tmp_path}"
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    assert "cannot be written" in next(iter(disk_checks(tmp_path, tmp_path))).found


def test_a_missing_package_is_found_in_the_extra_that_has_it() -> None:
    assert missing_package("h5py") == install_command("wsi")
    assert missing_package("openslide") == install_command("wsi")  # a module whose package has another name
    assert missing_package("obstore") == install_command("remote")
    assert missing_package("torchvision") == install_command("demo")  # several have it
    assert missing_package("torchvision", "export") == install_command("distill")
    assert missing_package("PIL", "store") == install_command("inspect")
    assert missing_package("zarr", "store") == install_command("demo")


def test_a_command_without_its_package_names_the_extra_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking() -> None:
        raise ModuleNotFoundError("No module named 'h5py._hl'", name="h5py._hl")

    monkeypatch.setattr("mmkd.cli.main.cli", lacking)
    with pytest.raises(SystemExit):
        main()
    message = f"Error: this command needs the package 'h5py'; run: {install_command('wsi')}\n"
    assert capsys.readouterr().err == message
