"""Training inputs kept in a store: same bytes always, judged by verify, read by training."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from in_process import load, tree_digest
from PIL import Image
from tiny_corpus import picture, png, write_table_corpus
from tiny_run import quiet, write_run, write_scene
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import ConfigError, CorruptStoreError, IncompleteStoreError, UserError
from mmkd.distill.config import load_run
from mmkd.distill.images import StoredImages
from mmkd.distill.prepare import prepare
from mmkd.distill.world import join_ranks
from mmkd.extract.corpora import open_corpus
from mmkd.extract.decoding import Threads, encode_input
from mmkd.extract.encode import Workbench
from mmkd.extract.index import create_indexed_store
from mmkd.extract.plan import plan_tasks
from mmkd.extract.shard import extract_shard
from mmkd.extract.teachers import Teacher
from mmkd.store import FeatureStore
from mmkd.store.inputs import Inputs, shards_without_inputs
from mmkd.store.record import Store
from mmkd.store.verify import repair, verify
from mmkd.store.writer import add_teacher, move_corpus


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """One tiny teacher."""
    return load({"one": write_tiny_teacher(tmp_path_factory.mktemp("t") / "one", seed=1)}, "one")


def extract_with_inputs(root: Path, corpus: Path, teachers: dict[str, Teacher], size: int, threads: int = 2) -> None:
    """What `mmkd extract --keep-inputs` does, without a scheduler."""
    if not (root / "zarr.json").exists():
        create_indexed_store(open_corpus(str(corpus)), root)
    store = FeatureStore.open(root)
    for teacher in teachers.values():
        add_teacher(store, teacher.card)
    cards = [teacher.card for teacher in teachers.values()]
    for task in plan_tasks(store.record, cards, store.ledger, shards_without_inputs(Store.open(root), size), size):
        chosen = {slug: teachers[slug] for slug in task.teachers}
        extract_shard(store, task.shard, chosen, Workbench(Threads(threads), keep_inputs=task.inputs))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Teacher]) -> Path:
    """A store of 280 rows in two shards with inputs of 36 pixels; rows 3 and 4 have no sound image."""
    root = tmp_path_factory.mktemp("kept")
    corpus = write_table_corpus(root / "corpus", 280)
    (root / "corpus/images/3.png").write_bytes(png(3)[:200])
    (root / "corpus/images/4.png").unlink()
    extract_with_inputs(root / "s", corpus, teachers, 36)
    return root


def test_inputs_are_the_pictures_at_student_size(kept: Path) -> None:
    store = FeatureStore.open(kept / "s")
    inputs = Inputs(store)
    found = Image.open(io.BytesIO(inputs.jpeg(0) or b""))
    assert found.size == (36, 43)  # of 40 x 48
    expected = np.asarray(picture(0).resize((36, 43), Image.Resampling.BICUBIC), dtype=float)
    assert np.abs(np.asarray(found, dtype=float) - expected).mean() < 4
    assert [row for row in range(280) if inputs.jpeg(row) is None] == [3, 4]
    # Any Arrow reads it, and the JPEG lies in the mapped file, not in a copy.
    before = pa.total_allocated_bytes()  # what other tests of this process still hold
    with pa.memory_map(str(kept / "s/inputs/00001.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table["row"].to_pylist() == list(range(256, 280))
        assert table["jpeg"][3].as_py() == bytes(inputs.jpeg(259) or b"")
        assert pa.total_allocated_bytes() - before < table.nbytes / 2
    again = pickle.loads(pickle.dumps(inputs))
    assert again.jpeg(7) == inputs.jpeg(7)


def test_small_pictures_keep_their_size_and_grey_stays_grey() -> None:
    small = Image.open(io.BytesIO(encode_input(picture(1), 500)))
    assert (small.size, small.mode) == ((40, 48), "RGB")
    grey = Image.open(io.BytesIO(encode_input(picture(1).convert("L"), 20)))
    assert (grey.size, grey.mode) == ((20, 24), "L")
    thin = Image.open(io.BytesIO(encode_input(Image.new("RGBA", (400, 2)), 1)))
    assert (thin.size, thin.mode) == ((200, 1), "RGB")


def test_bytes_do_not_depend_on_threads_company_or_when_they_were_asked_for(
    kept: Path, tmp_path: Path, teachers: dict[str, Teacher]
) -> None:
    corpus = kept / "corpus/pairs.csv"
    # Features first, inputs in a later run, one shard's entry lost in between.
    extract_with_inputs(tmp_path / "s", corpus, teachers, 36, threads=1)
    expected = tree_digest(kept / "s")
    assert tree_digest(tmp_path / "s") == expected
    shutil.rmtree(tmp_path / "s/inputs")
    extract_with_inputs(tmp_path / "s", corpus, teachers, 36, threads=4)
    (tmp_path / "s/inputs/00000.json").unlink()
    extract_with_inputs(tmp_path / "s", corpus, {}, 36)
    assert tree_digest(tmp_path / "s") == expected


def test_other_sizes_are_not_mixed(kept: Path) -> None:
    with pytest.raises(UserError, match="keeps inputs of 36 pixels, not 48; ask for 36"):
        shards_without_inputs(Store.open(kept / "s"), 48)


@pytest.mark.parametrize("harm", ["byte", "cut", "gone", "entry", "rows", "name"])
def test_verify_sees_harm_and_repair_drops_exactly_that_shard(kept: Path, tmp_path: Path, harm: str) -> None:
    root = tmp_path / "s"
    shutil.copytree(kept / "s", root)
    assert verify(root).sound
    arrow, entry = root / "inputs/00001.arrow", root / "inputs/00001.json"
    data = arrow.read_bytes()
    if harm == "byte":
        middle = len(data) // 2
        arrow.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif harm == "cut":
        arrow.write_bytes(data[:-1])
    elif harm == "gone":
        arrow.unlink()
    elif harm == "entry":
        entry.write_text("{}")
    elif harm == "rows":  # sound in themselves, but of another shard
        arrow.write_bytes((root / "inputs/00000.arrow").read_bytes())
        entry.write_text((root / "inputs/00000.json").read_text().replace('"shard": 0', '"shard": 1'))
    else:
        entry.write_text((root / "inputs/00000.json").read_text())
    report = verify(root)
    assert {finding.file for finding in report.findings} == {"inputs/00001.json"}
    assert repair(root, report) == ("dropped inputs/00001.json",)
    assert verify(root).sound
    assert shards_without_inputs(Store.open(root), 36) == {1}


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training_scene with inputs of 40 pixels, whose corpus is gone."""
    root = write_scene(tmp_path_factory.mktemp("away"))
    extract_with_inputs(root / "features", root / "corpus/pairs.csv", {}, 40)
    move_corpus(root / "features", root / "corpus")
    shutil.rmtree(root / "corpus")
    return root


def test_training_needs_no_corpus_when_inputs_are_there(away: Path) -> None:
    losses = [quiet(write_run(away, f"w{n}", epochs=1, data={"workers": n})).losses for n in (0, 2)]
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match=r"file not found.*train from `inputs`"):
        quiet(write_run(away, "corpus", data={"images": "corpus"}))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_of_inputs_is_one_line(away: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def refuse(self: Inputs, row: int) -> None:
        raise CorruptStoreError("inputs/00000 is damaged")

    monkeypatch.setattr(Inputs, "jpeg", refuse)
    with pytest.raises(CorruptStoreError, match=r"^inputs/00000 is damaged$"):
        quiet(write_run(away, f"damaged-{workers}", data={"workers": workers}))


def test_data_workers_end_in_peace(away: Path) -> None:
    """Any other exit status reaches the training loop as a signal, and an error, at whatever it does by then."""
    config = load_run(write_run(away, "peace", epochs=1, data={"workers": 2}))
    with join_ranks(1) as world, closing(prepare(config, world).batches.from_step(0)) as batches:
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        assert len(list(batches)) == 4
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_inputs_that_are_missing_or_too_small_are_refused(away: Path, tmp_path: Path) -> None:
    shutil.copytree(away, tmp_path / "c")
    (tmp_path / "c/features/inputs/00001.json").unlink()
    with pytest.raises(IncompleteStoreError, match="no inputs in 1 shard, the first is 1"):
        quiet(write_run(tmp_path / "c", "lacking", data={"images": "inputs"}))
    student = (away / "tiny-student.json").read_text().replace('"image_size": 32', '"image_size": 48')
    (away / "larger.json").write_text(student)
    with pytest.raises(UserError, match="keeps inputs of 40 pixels, the student sees 48"):
        quiet(write_run(away, "small", student={"model": "larger.json"}, data={"images": "inputs"}))


def first_pictures(root: Path, decode: str, workers: int = 0) -> torch.Tensor:
    """Of an epoch, uint8 (24, 3, 32, 32)."""
    changes = {"decode": decode, "workers": workers}
    config = load_run(write_run(root, f"{decode}-{workers}", epochs=1, data=changes))
    with join_ranks(1) as world, closing(prepare(config, world).batches.from_step(0)) as batches:
        return next(batches).images


def test_pictures_decoded_on_the_device_are_the_crops_of_the_workers(away: Path) -> None:
    """Same parts of the same pictures; another resize rounds otherwise, by a level or two."""
    workers, device = first_pictures(away, "workers").float(), first_pictures(away, "device").float()
    assert torch.equal(device, first_pictures(away, "device", workers=2).float())
    assert (workers - device).abs().mean() < 1
    assert (workers - device).abs().max() <= 8
    assert (workers - device.roll(1, 0)).abs().mean() > 20
    assert (workers - device.roll(1, 3)).abs().mean() > 3


def test_training_decodes_on_the_device_and_that_is_another_run(away: Path, tmp_path: Path) -> None:
    losses = [
        quiet(write_run(away, f"on-{how}", epochs=1, data={"decode": how})).losses for how in ("workers", "device")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[1] != losses[0]
    with pytest.raises(UserError, match="another configuration or store"):
        quiet(write_run(away, "on-device", epochs=1))
    with pytest.raises(ConfigError, match=r"data\.decode: device decodes the JPEGs .* --keep-inputs 32"):
        quiet(write_run(away, "of-corpus", data={"decode": "device", "images": "corpus"}))


def test_a_jpeg_that_the_device_cannot_decode_is_one_line(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = StoredImages.read
    for name, harm in (("cut", lambda data: data[:-60]), ("no", lambda data: b"nothing")):
        monkeypatch.setattr(StoredImages, "read", lambda self, row, harm=harm: harm(whole(self, row)))
        with pytest.raises(UserError, match=r"row") as caught:
            quiet(write_run(away, f"harmed-{name}", epochs=1, data={"decode": "device"}))
        assert "\n" not in str(caught.value)
        assert ("cannot be decoded on cpu" in str(caught.value)) == (name == "cut")
