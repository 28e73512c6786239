"""Files that are there wholly or not at all, and what a killed writer leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mmkd.base.files import create_atomically, remove_abandoned, write_atomically

# A writer that gets no further than its half-written file.
WRITER = """
import os, sys, time
from pathlib import Path
from mmkd.base.files import write_atomically
def stand(_):
    print("in", flush=True)
    time.sleep(600)
os.fsync = stand
write_atomically(Path(sys.argv[1]), b"half")
"""


def aged(path: Path, seconds: float) -> None:
    stat = path.stat()
    os.utime(path, (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "0", b"whole")
    command = [sys.executable, "-P", "-c", WRITER, str(tmp_path / "a" / "0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "in\n"
        (half,) = (tmp_path / "a").glob(".*")
        aged(half, 7200)
        assert remove_abandoned(tmp_path) == 0
        assert half.exists()
        writer.kill()
        writer.wait()
    assert remove_abandoned(tmp_path) == 1
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["0"]
    assert (tmp_path / "a" / "0").read_bytes() == b"whole"


def test_of_another_machine_only_age_tells(tmp_path: Path) -> None:
    for name, age in (("young", 60), ("old", 7200)):
        path = tmp_path / f".{name}.node17-4242-0a1b2c3d.mmkd-tmp"
        path.write_bytes(b"half")
        aged(path, age)
    (tmp_path / ".folder.mmkd-tmp").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    assert remove_abandoned(tmp_path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".folder.mmkd-tmp",
        ".young.node17-4242-0a1b2c3d.mmkd-tmp",
        "mine.txt",
    ]


def test_what_is_created_once_stays(tmp_path: Path) -> None:
    assert create_atomically(tmp_path / "a", b"first")
    assert not create_atomically(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
