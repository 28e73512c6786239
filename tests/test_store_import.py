"""The original release's real features go in and come out equal; hostile `.pt` files do not."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mmkd.base.errors import CorpusError
from mmkd.cli.main import cli
from mmkd.store import FeatureStore
from mmkd.store.convert.importing import import_features
from mmkd.store.convert.original import OriginalRelease
from mmkd.store.convert.original_export import export_original
from mmkd.store.convert.torch_file import read_tensors, write_tensors
from mmkd.store.ledger import remove_entry

RELEASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mmkd_release"
needs_release = pytest.mark.skipif(not RELEASE.is_dir(), reason="the original release's samples are not here")


def quiet(done: int, every: int) -> None:
    """No progress."""


def expected(root: Path, file: str) -> dict[tuple[int, str], np.ndarray]:
    """(row, key) to values, by PyTorch itself."""
    out = {}
    for row, line in enumerate((root / "meta.jsonl").read_text().splitlines()):
        meta = json.loads(line)
        path = root / "features" / meta["folderid"] / meta["id"] / f"{file}.pt"
        if path.is_file():
            out |= {(row, name): value.numpy() for name, value in torch.load(path, weights_only=True).items()}
    return out


def read_back(store: FeatureStore) -> dict[tuple[int, str], np.ndarray]:
    """The same of a store; only rows marked sound."""
    out = {}
    for slug, card in store.teachers.items():
        for row, bits in enumerate(store.valid(slug)):
            for bit, (tower, suffix) in enumerate((("image", "img"), ("text", "txt"))):
                if bits >> bit & 1:
                    out[row, f"{card.source.rpartition(':')[2]}_{suffix}"] = getattr(store, tower)(slug)[row]
    return out


def test_the_command_reads_the_file_that_was_named(small_store: Path, tmp_path: Path) -> None:
    export_original(FeatureStore.open(small_store), tmp_path / "release", ["clips_project_output"], allow_loss=["all"])
    words = ["store", "import", str(tmp_path / "release"), str(tmp_path / "s")]
    assert "no clips_output.pt below" in str(CliRunner().invoke(cli, words).exception)
    assert CliRunner().invoke(cli, [*words, "--features", "clips_project_output"]).exit_code == 0
    there, back = FeatureStore.open(small_store), FeatureStore.open(tmp_path / "s")
    for slug in there.teachers:
        assert np.array_equal(back.image(slug), there.image(slug), equal_nan=True)


@needs_release
@pytest.mark.parametrize("file", ["clips_output", "clips_project_output"])
def test_real_features_come_out_equal(tmp_path: Path, file: str) -> None:
    report = import_features(OriginalRelease(RELEASE, file), tmp_path / "s", "float32", quiet)
    assert (report.rows, report.shards, report.failed) == (4, 1, 0)
    store = FeatureStore.open(tmp_path / "s")
    assert list(store.teachers) == [
        "biomedclip", "bmca", "genmedclip", "plip", "pmcclip", "pubmedclip", "quiltnet", "unimedclip",
    ]  # fmt: skip
    truth, found = expected(RELEASE, file), read_back(store)
    assert found.keys() == truth.keys()
    assert len(truth) == 2 * (6 + 6 + 5 + 6)
    assert all(np.array_equal(found[name], truth[name]) for name in truth)
    assert store.verify(deep=True).sound
    clips = store.sample_table(["available_clips"])["available_clips"].to_pylist()
    assert [row.count(",") + 1 for row in clips] == store.available().sum(axis=1).tolist()


@needs_release
def test_float16_rounds_to_nearest(tmp_path: Path) -> None:
    import_features(OriginalRelease(RELEASE), tmp_path / "s", "float16", quiet)
    truth, found = expected(RELEASE, "clips_output"), read_back(FeatureStore.open(tmp_path / "s"))
    assert all(np.array_equal(found[name], truth[name].astype(np.float16)) for name in truth)
    worst = min(
        float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        for a, b in ((found[name].astype(np.float64), truth[name].astype(np.float64)) for name in truth)
    )
    assert worst > 1 - 1e-6


@needs_release
def test_there_and_back_gives_the_release(tmp_path: Path) -> None:
    import_features(OriginalRelease(RELEASE), tmp_path / "s", "float32", quiet)
    assert export_original(FeatureStore.open(tmp_path / "s"), tmp_path / "out", allow_loss=["all"]).samples == 4
    truth, found = expected(RELEASE, "clips_output"), expected(tmp_path / "out", "clips_output")
    assert found.keys() == truth.keys()
    assert all(np.array_equal(found[name], truth[name]) for name in truth)
    lines = [(path / "meta.jsonl").read_text().splitlines() for path in (RELEASE, tmp_path / "out")]
    before, after = ([json.loads(line) for line in part] for part in lines)
    assert [row | {"available_clips": sorted(row["available_clips"])} for row in after] == [
        row | {"available_clips": sorted(row["available_clips"])} for row in before
    ]


@needs_release
def test_an_interrupted_import_goes_on_and_damage_is_a_reason(tmp_path: Path) -> None:
    source = tmp_path / "release"
    shutil.copytree(RELEASE, source, copy_function=shutil.copyfile)
    for folder in [source, *source.rglob("*")]:
        folder.chmod(0o755)
    ids = [json.loads(line)["id"] for line in (source / "meta.jsonl").read_text().splitlines()]
    (folder,) = (source / "features").iterdir()
    (folder / ids[1] / "clips_output.pt").unlink()
    damaged = folder / ids[2] / "clips_output.pt"
    damaged.write_bytes(damaged.read_bytes()[:9000])
    report = import_features(OriginalRelease(source), tmp_path / "s", "float32", quiet)
    assert report.failed == 2
    store = FeatureStore.open(tmp_path / "s")
    assert store.sample_table(["status"])["status"].to_pylist() == ["ok", "failed", "failed", "ok"]
    reasons = store.sample_table(["reason"])["reason"].to_pylist()
    assert reasons[1] == "features: file not found"
    assert reasons[2].startswith("features: is not a PyTorch zip file")
    assert not store.available()[1:3].any()
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    remove_entry(tmp_path / "s", 0, "plip")
    assert import_features(OriginalRelease(source), tmp_path / "s", "float32", quiet).shards == 1
    assert {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()} == before
    with pytest.raises(CorpusError, match="name a new store"):
        import_features(OriginalRelease(source, "clips_project_output"), tmp_path / "s", "float32", quiet)


def saved(value: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_tensors_of_torch_are_read_as_torch_reads_them() -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {"half": base.half(), "double": base.double(), "view": base[1:, ::2], "turned": base.T, "one": base[0, 0]}
    found = read_tensors(saved(OrderedDict(tensors)))
    assert all(np.array_equal(found[name], value.numpy()) for name, value in tensors.items())
    assert [found[name].dtype for name in ("half", "double", "view")] == [np.float16, np.float64, np.float32]


def test_what_we_write_torch_reads() -> None:
    values = {"A_img": np.arange(5, dtype=np.float32), "A_txt": np.full(70_000, 0.5, dtype=np.float32)}
    data = write_tensors(values, "clips_output")
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert list(found) == list(values)
    assert all(np.array_equal(found[name].numpy(), values[name]) for name in values)
    assert all(np.array_equal(read_tensors(data)[name], values[name]) for name in values)


class Evil:
    """Runs a command when it is unpickled by the ordinary unpickler."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def with_pickle(code: bytes) -> bytes:
    """A `.pt` file with this pickle and one storage of four floats."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x/data.pkl", code)
        archive.writestr("x/data/0", bytes(16))
    return buffer.getvalue()


def tensor(offset: int = 0, size: int = 4, stride: int = 1, storage: int = 4) -> bytes:
    """A pickle of {'a': tensor} with chosen numbers."""

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    where = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + number(storage) + b"tQ"
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89N"
    return b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + where + shape + b"tRs."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PyTorch zip"),
        (b"PK\x03\x04" + bytes(50), "not a PyTorch zip"),
        (with_pickle(pickle.dumps({"a": Evil()})), "asks for builtins.print|asks for __builtin__"),
        (with_pickle(b"cos\nsystem\n(X\x04\0\0\0exittR."), "asks for os.system"),
        (with_pickle(b"ctorch.hub\nload\n."), "asks for torch.hub.load"),
        (with_pickle(tensor(size=5)), "beyond its storage"),
        (with_pickle(tensor(offset=1)), "beyond its storage"),
        (with_pickle(tensor(stride=-1)), "negative size"),
        (with_pickle(tensor(offset=-4)), "negative size"),
        (with_pickle(tensor(stride=0, size=2_000_000_000)), "larger than its storage"),
        (with_pickle(tensor(storage=5)), "16 bytes, expected 20"),
        (with_pickle(pickle.dumps({"a": 7})), "something else than a dict of tensors"),
        (with_pickle(pickle.dumps([1])), "something else than a dict of tensors"),
        (with_pickle(b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\0\0\0aK\x01sb."), "cannot be read as tensors"),
        (with_pickle(b"garbage"), "cannot be read as tensors"),
    ],
)
def test_hostile_files_are_refused(data: bytes, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorpusError, match=message):
        read_tensors(data)
    assert capsys.readouterr().out == ""


def test_every_cut_and_many_flips_of_a_file_are_refused_or_read() -> None:
    data = write_tensors({"A_img": np.arange(3, dtype=np.float32)}, "c")
    for length in range(0, len(data), 7):
        with pytest.raises(CorpusError):
            read_tensors(data[:length])
    accepted = []
    for index in range(len(data)):
        for mask in (1, 0x80, 0xFF):
            flipped = data[:index] + bytes([data[index] ^ mask]) + data[index + 1 :]
            try:
                accepted.append(read_tensors(flipped))
            except CorpusError:
                continue
    # The zip's checksums cover every member; names of folders and times are not covered, and change no value.
    assert all(list(found) == ["A_img"] and found["A_img"].tolist() == [0, 1, 2] for found in accepted)


@pytest.mark.parametrize("folder", ["..", "a/b", ""])
def test_a_release_that_would_leave_its_folder_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "meta.jsonl").write_text(json.dumps({"folderid": folder, "id": "x", "available_clips": []}))
    with pytest.raises(CorpusError, match=r"line 1: .* does not name a folder below features/"):
        import_features(OriginalRelease(tmp_path), tmp_path / "s", "float32", quiet)
