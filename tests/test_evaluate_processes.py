"""Units in several processes: the same numbers, and what becomes of a process that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from extract_scene import children
from planted_store import Planted, make_planted
from threadpoolctl import threadpool_info, threadpool_limits

from mmkd.evaluate import load_suite, run_suite
from mmkd.evaluate import runner as run_unit
from mmkd.evaluate.plan import Loaded
from mmkd.evaluate.predictions import Predictions
from mmkd.evaluate.task import Unit

# Python runs this when a process starts: children of the test have it, the test itself began before.
IN_CHILDREN = """
import os, signal, time
from mmkd.evaluate import runner as run_unit
predict = run_unit._predict
def changed(loaded, planned):
    {what}
    return predict(loaded, planned)
run_unit._predict = changed
"""


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """A good and a bad encoder."""
    return make_planted(tmp_path, {"sharp": 0.5, "blurred": 3.0})


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes from the first unit on."""
    monkeypatch.setattr("mmkd.evaluate.runner.SECONDS_HERE", 0.0)


def in_children(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(IN_CHILDREN.format(what=what))
    monkeypatch.setenv("PYTHONPATH", f"{folder / 'site'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.integration
@pytest.mark.usefixtures("at_once")
def test_numbers_do_not_depend_on_the_number_of_processes(planted: Planted, tmp_path: Path) -> None:
    outs = [run_suite(load_suite(planted.suite), tmp_path / str(jobs), jobs=jobs).out for jobs in (1, 2)]
    lines = [[json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()] for out in outs]
    found = [sorted(json.dumps(line | {"seconds": 0}) for line in some) for some in lines]
    assert len(found[0]) > 18
    assert found[0] == found[1]
    files = [{path.name: path.read_bytes() for path in out.rglob("*.parquet")} for out in outs]
    assert len(files[0]) == 18
    assert files[0] == files[1]


@pytest.mark.integration
@pytest.mark.usefixtures("at_once")
def test_a_process_that_dies_costs_its_unit_only(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = "if (planned.model, planned.task) == ('blurred', 'zero_shot'): os.kill(os.getpid(), signal.SIGKILL)"
    in_children(tmp_path, kill, monkeypatch)
    planted.edit(dataset={"tasks": ["zero_shot", "retrieval"]})
    seen = []
    report = run_suite(
        load_suite(planted.suite), tmp_path / "out", jobs=2, progress=lambda outcome, total: seen.append(total)
    )
    (failed,) = report.failed
    assert (failed.unit.model, failed.unit.task) == ("blurred", "zero_shot")
    assert failed.reason == "its process died, twice; too little memory? Try fewer --jobs"
    assert report.count("ran") == 8
    assert seen == [9] * 9
    monkeypatch.undo()
    again = run_suite(load_suite(planted.suite), tmp_path / "out")
    assert (again.count("done"), again.count("ran")) == (8, 1)


@pytest.mark.integration
def test_processes_end_with_the_one_that_started_them(
    planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from mmkd.evaluate import load_suite, run_suite, runner\n"
        "if __name__ == '__main__':\n"
        "    runner.SECONDS_HERE = 0.0\n"
        f"    run_suite(load_suite({str(planted.suite)!r}), Path({str(tmp_path / 'out')!r}), jobs=2)\n"
    )
    in_children(tmp_path, f"Path({str(tmp_path)!r}, f'ran-{{os.getpid()}}').touch(); time.sleep(300)", monkeypatch)
    code = (tmp_path / "site" / "sitecustomize.py").read_text()
    (tmp_path / "site" / "sitecustomize.py").write_text("from pathlib import Path\n" + code)
    process = subprocess.Popen([sys.executable, "-P", str(script)])
    try:
        wait_until(lambda: len(list(tmp_path.glob("ran-*"))) == 2)
        started = children(process.pid)
        assert {int(path.name[4:]) for path in tmp_path.glob("ran-*")} <= set(started)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}/cmdline").is_file() for pid in started))


def wait_until(condition: object, seconds: float = 60) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.integration
def test_a_unit_computes_with_one_thread(planted: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many the libraries were told to use: the last digit would depend on it."""
    seen: set[int] = set()

    def looked_at(loaded: Loaded, planned: Unit) -> Predictions:
        seen.update(library["num_threads"] for library in threadpool_info())
        return predict(loaded, planned)

    predict = run_unit._predict
    monkeypatch.setattr(run_unit, "_predict", looked_at)
    with threadpool_limits(2):
        run_suite(load_suite(planted.suite), tmp_path / "out")
    assert seen == {1}
