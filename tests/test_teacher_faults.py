"""A teacher that raises or hangs in its forward pass; an archive cut off while it is read. Then: the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from extract_scene import ROWS, Scene, ended, entries, mmkd, rows_done, started, wait_for
from in_process import tree_digest
from PIL import Image
from tiny_corpus import write_tar_corpus

from mmkd.extract.teachers import describe_teacher, parse_teachers
from mmkd.extract.teachers.geometry import geometry_of, pixels_of
from mmkd.store import FeatureStore

SHARD = 256
pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

LOADER = """
import os, time
from pathlib import Path
import torch
from mmkd.extract.teachers import describe_teacher, load_teacher

def inner(spec):
    return spec.model_copy(update={"source": "local-dir:" + spec.source.partition(":")[2], "loader": "auto"})

class Failing:
    def __init__(self, teacher):
        self.teacher = teacher
    def __getattr__(self, name):
        return getattr(self.teacher, name)
    def encode_images(self, pixels):
        left = Path(os.environ["FAULTS_LEFT"])
        met = (pixels == torch.load(os.environ["FAULT_AT"])).flatten(1).all(1).any()
        if met and (number := int(left.read_text())):
            left.write_text(str(number - 1))
            if os.environ["FAULT"] == "hang":
                time.sleep(1000)
            raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")
        return self.teacher.encode_images(pixels)

class Loader:
    def describe(self, spec):
        return describe_teacher(inner(spec))
    def load(self, spec, card, device):
        return Failing(load_teacher(inner(spec), card, device))

LOADER = Loader()
"""


def failing(scene: Scene, folder: Path, fault: str, times: int) -> tuple[list[str], dict[str, str]]:
    """The scene's command with a teacher that fails so many times on the batch of row 300, and its environment."""
    info = folder / "failing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[mmkd.teachers]\nfailing = failing_teacher:LOADER\n")
    (folder / "failing_teacher.py").write_text(LOADER)
    (folder / "left").write_text(str(times))
    (spec,) = parse_teachers(scene.teachers)
    with Image.open(scene.table.parent / "images" / "300.png") as picture:
        geometry = geometry_of(describe_teacher(spec).preprocessing)
        pixels = pixels_of(picture, [geometry])[geometry]
    torch.save(torch.from_numpy(pixels), folder / "pixels.pt")
    environment = os.environ | {
        "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "FAULT": fault,
        "FAULT_AT": str(folder / "pixels.pt"),
        "FAULTS_LEFT": str(folder / "left"),
    }
    cluster = folder / "cluster.yaml"
    cluster.write_text(yaml.safe_dump({"workers": 1, "worker": {"hang_seconds": 8}}))
    command = scene.command(folder / "store", "--scheduler", cluster)
    command[command.index("--teachers") + 1] = f"tiny=failing:{scene.teacher}"
    return command, environment


@pytest.mark.parametrize(
    ("fault", "times", "lost"),
    [
        ("raise", 1, None),
        ("raise", 3, "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        ("hang", 1, None),
        ("hang", 4, "its workers died or hung; too little memory, or a fault in a teacher?"),
    ],
)
def test_a_teacher_that_fails_on_one_batch(
    scene: Scene, tmp_path: Path, fault: str, times: int, lost: str | None
) -> None:
    """Once: the shard is done again and nobody notices. Each time: that shard is lost, and no other."""
    command, environment = failing(scene, tmp_path, fault, times)
    store = tmp_path / "store"
    done = ended(command, env=environment)
    assert "Traceback" not in done.stderr
    assert (tmp_path / "left").read_text() == "0"
    if lost is not None:
        assert done.returncode == 1, done.stdout + done.stderr
        assert [line for line in done.stdout.splitlines() if line.startswith("lost: ")] == [f"lost: shard 1: {lost}"]
        assert entries(store) == ROWS // SHARD - 1
        done = ended(command, env=environment)
        assert "1 shard to do" in done.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lost:" not in done.stdout
    assert scene.same(store)
    assert rows_done(store) == ROWS


def test_rows_of_a_lost_shard_count_as_failed(scene: Scene, tmp_path: Path) -> None:
    command, environment = failing(scene, tmp_path, "raise", 3)
    done = ended([*command, "--failures", "255"], env=environment)
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    reason = "256 x shard lost: RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"
    assert f"rows failed, more than --failures 255 rows ({reason})" in line
    assert ended([*command, "--failures", "255"], env=environment).returncode == 0
    assert scene.same(tmp_path / "store")


def test_a_tar_cut_off_in_the_middle_of_a_member_after_it_was_indexed(scene: Scene, tmp_path: Path) -> None:
    tars, store, log = write_tar_corpus(tmp_path / "tars", ROWS, per_tar=SHARD), tmp_path / "store", tmp_path / "log"
    whole = tmp_path / "whole"
    there = Scene(tars, scene.teacher, whole)
    assert ended(there.command(whole, "--workers", 2)).returncode == 0
    # The run stops after its first shard; the last archive loses its second half inside an image.
    run = started(there.command(store, "--workers", 1), log)
    wait_for(lambda: entries(store) >= 1, run, log)
    rows = FeatureStore.open(store).sample_table(columns=["uri", "offset", "length"]).to_pylist()
    last = tars / "00007.tar"
    data = last.read_bytes()
    cut = rows[ROWS - 100]["offset"] + 50
    assert rows[ROWS - 100]["uri"] == "00007.tar"
    os.truncate(last, cut)
    assert entries(store) < 8, "the cut came too late to prove anything"
    assert run.wait(timeout=600) == 0, log.read_text()
    table = FeatureStore.open(store).sample_table(columns=["status", "reason"]).to_pylist()
    assert {row["status"] for row in table[:-100]} == {"ok"}
    assert {(row["status"], row["reason"]) for row in table[-100:]} == {
        ("partial", "image: archive ends inside this member")
    }
    # The run's end and the store tell the same story.
    assert "100 x image: archive ends inside this member" in log.read_text()
    told = mmkd("store", "info", store).stdout
    assert "rows      2,048 (1,948 ok, 100 partial) in 8 shards of 256" in told
    assert "100 x image: archive ends inside this member" in told
    assert "  tiny: image " in told
    refused = ended(there.command(store, "--workers", 1, "--failures", "retry"))
    assert refused.returncode == 1
    assert f"00007.tar has {cut:,} bytes, had {len(data):,}" in refused.stderr
    # Brought back, with another change time: the same command mends the rows, and only those are read.
    last.write_bytes(data)
    read = rows_done(store)
    mended = ended(there.command(store, "--workers", 1, "--failures", "retry"))
    assert mended.returncode == 0, mended.stderr
    assert rows_done(store) - read == 100
    assert tree_digest(store) == tree_digest(whole)
