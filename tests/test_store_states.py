"""States and absences that the life of a store must not lose: int8 values, statuses, moved and half copied stores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from tiny_store import make_card, make_selection, make_store

from mmkd.base.errors import CorpusError, CorruptStoreError, MmkdError, NotAStoreError
from mmkd.cli.store.convert import export
from mmkd.store import FeatureStore
from mmkd.store.convert.clip_retrieval import ClipRetrievalFolder, export_npy
from mmkd.store.convert.importing import NO_FEATURE, import_features
from mmkd.store.convert.original_export import export_original
from mmkd.store.convert.rows import StoreRows, chosen_rows
from mmkd.store.encoding import decode_rows, encode_rows
from mmkd.store.fold import fold
from mmkd.store.inputs import Inputs
from mmkd.store.samples import read_part, with_columns, write_part
from mmkd.store.verify import verify
from mmkd.store.writer import ShardFeatures, note_encoding_error, write_shard


def silent(done: int, every: int) -> None:
    """Progress of no interest."""


def test_decoded_int8_is_encoded_to_the_same_values() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20_000, 8)).astype(np.float32) * rng.lognormal(0, 4, (20_000, 1)).astype(np.float32)
    sound = np.ones(len(values), dtype=bool)
    once = decode_rows(encode_rows(values, sound, "int8")[0])
    twice = decode_rows(encode_rows(once, sound, "int8")[0])
    assert np.array_equal(once, twice)


@pytest.mark.parametrize("way", ["subset", "npy"])
def test_int8_values_and_their_cost_survive(tmp_path: Path, way: str) -> None:
    card = make_card("alpha", 16).with_encoding("int8")
    store, _ = make_store(tmp_path / "st", 600, [card])
    note_encoding_error(store, "alpha")
    source = FeatureStore.open(tmp_path / "st")
    if way == "npy":
        export_npy(source, tmp_path / "npy")
        import_features(ClipRetrievalFolder(tmp_path / "npy/alpha", "other"), tmp_path / "out", None, silent)
    else:
        import_features(StoreRows([(source, np.arange(600))]), tmp_path / "out", None, silent)
    found = FeatureStore.open(tmp_path / "out")
    for tower in ("image", "text"):
        pair = (np.asarray(each.features("alpha", tower)) for each in (found, source))
        assert np.array_equal(*pair, equal_nan=True)
    assert found.card("alpha").encoding_error == source.card("alpha").encoding_error
    assert source.card("alpha").encoding_error["image"].worst > 0


def test_a_subset_is_not_continued_after_its_source_was_extracted_further(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 600, [make_card()])
    entry = tmp_path / "st/ledger/00001.alpha.json"
    entry.rename(tmp_path / "entry")

    def run() -> None:
        store = FeatureStore.open(tmp_path / "st")
        import_features(StoreRows([(store, np.arange(600))], allow_loss=["extraction"]), tmp_path / "out", None, silent)

    run()
    run()
    (tmp_path / "entry").rename(entry)
    with pytest.raises(CorpusError, match=r"made from other rows or features .* name a new store"):
        run()


def test_a_key_names_the_row_that_did_not_fail(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 4, [])
    states = {"key": ["a", "a", "b", "b"], "status": ["failed", "ok", "failed", "failed"]}
    write_part(tmp_path / "st", 0, with_columns(read_part(tmp_path / "st", 0)[0], states))
    assert chosen_rows(FeatureStore.open(tmp_path / "st"), ["b", "a"]).tolist() == [2, 1]


def clip_folder(folder: Path, table: pa.Table, values: np.ndarray) -> ClipRetrievalFolder:
    for name in ("metadata", "img_emb"):
        (folder / name).mkdir(parents=True)
    pq.write_table(table, folder / "metadata/metadata_0.parquet")
    np.save(folder / "img_emb/img_emb_0.npy", values)
    return ClipRetrievalFolder(folder, "m")


def test_an_imported_row_without_a_feature_failed(tmp_path: Path) -> None:
    values = np.array([[1, 2], [np.nan, 1], [0, 0], [1e6, 1]], np.float32)
    source = clip_folder(tmp_path / "in", pa.table({"caption": list("abcd")}), values)
    assert import_features(source, tmp_path / "st", "float16", silent).failed == 3
    found = FeatureStore.open(tmp_path / "st").sample_table(["status", "reason"]).to_pydict()
    assert found == {"status": ["ok", *["failed"] * 3], "reason": [None, *[NO_FEATURE] * 3]}


def test_an_imported_row_without_one_of_both_features_is_partial(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    clip_folder(folder, pa.table({"caption": ["a", "b", None]}), np.ones((3, 2), np.float32))
    pq.write_table(pa.table({"caption": ["d"]}), folder / "metadata/metadata_1.parquet")
    pq.write_table(pa.table({"caption": ["e"]}), folder / "metadata/metadata_2.parquet")
    np.save(folder / "img_emb/img_emb_1.npy", np.ones((1, 2), np.float32))
    (folder / "text_emb").mkdir()
    np.save(folder / "text_emb/text_emb_0.npy", np.array([[1, 2], [np.nan, 1], [np.nan, 1]], np.float32))
    assert import_features(ClipRetrievalFolder(folder, "m"), tmp_path / "st", "float16", silent).failed == 1
    found = FeatureStore.open(tmp_path / "st").sample_table(["status", "reason"]).to_pydict()
    assert found["status"] == ["ok", "partial", "ok", "partial", "failed"]
    lost = ["text: text_emb_1.npy is missing", "image: img_emb_2.npy is missing; text: text_emb_2.npy is missing"]
    assert found["reason"] == [None, f"text {NO_FEATURE}", None, *lost]


def test_features_of_clip_retrieval_without_a_part_or_of_two_are_refused(tmp_path: Path) -> None:
    source = clip_folder(tmp_path / "in", pa.table({"caption": ["a"]}), np.ones((1, 2), np.float32))
    np.save(tmp_path / "in/img_emb/img_emb_1.npy", np.ones((1, 2), np.float32))
    with pytest.raises(CorpusError, match=r"img_emb_1.npy has no metadata part of its number"):
        import_features(source, tmp_path / "st", None, silent)
    (tmp_path / "in/img_emb/img_emb_1.npy").rename(tmp_path / "in/img_emb/img_emb_00.npy")
    with pytest.raises(CorpusError, match=r"img_emb_00?.npy and img_emb_00?.npy have the same number"):
        import_features(ClipRetrievalFolder(tmp_path / "in", "m"), tmp_path / "st", None, silent)
    assert not (tmp_path / "st").exists()


def test_columns_of_clip_retrieval_are_not_taken_for_places_in_a_file(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a"], "length": ["long"], "offset": [0.5], "row": [7]})
    import_features(clip_folder(tmp_path / "in", table, np.ones((1, 2), np.float32)), tmp_path / "st", None, silent)
    found = FeatureStore.open(tmp_path / "st").sample_table().to_pylist()[0]
    assert (found["length"], found["offset"], found["row"]) == (None, None, 0)
    assert [found[f"metadata_{name}"] for name in ("length", "offset", "row")] == ["long", "0.5", "7"]


def test_an_export_in_the_releases_layout_asks_for_what_it_loses(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 3, [make_card("alpha", 4)])
    write_part(tmp_path / "st", 0, with_columns(read_part(tmp_path / "st", 0)[0], {"width": [7, None, 7]}))
    command = [str(tmp_path / "st"), str(tmp_path / "out"), "--layout", "original"]
    refused = CliRunner().invoke(export, command)
    assert str(refused.exception) == (
        "the release's layout would be without the cards of alpha (the release has names alone); without the column "
        "values width of 2 rows; without the keys of 3 rows ('k0' becomes 'mmkd/k0'); nothing was written: add "
        "--allow-loss cards,columns,keys to accept this"
    )
    assert not (tmp_path / "out").exists()
    some = CliRunner().invoke(export, [*command, "--allow-loss", "cards,keys"])
    assert "--allow-loss columns to accept this" in str(some.exception)
    assert CliRunner().invoke(export, [*command, "--allow-loss", "cards,keys,columns"]).output.startswith("3 samples")


def test_an_unknown_kind_of_loss_is_one_line(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 3, [make_card("alpha", 4)])
    command = [str(tmp_path / "st"), str(tmp_path / "out"), "--layout", "npy", "--allow-loss", "colums"]
    assert "--allow-loss 'colums' is none of cards, columns, extraction" in str(
        CliRunner().invoke(export, command).exception
    )


def test_captions_and_keys_of_other_types_are_text(tmp_path: Path) -> None:
    table = pa.table(
        {"key": [7, 8], "caption": pa.array([1.5, None]), "modality": pa.array(["CT", "MR"]).dictionary_encode()}
    )
    source = clip_folder(tmp_path / "in", table, np.ones((2, 2), np.float32))
    import_features(source, tmp_path / "st", "float16", silent)
    found = FeatureStore.open(tmp_path / "st").sample_table(["key", "caption", "modality"]).to_pydict()
    assert found == {"key": ["7", "8"], "caption": ["1.5", None], "modality": ["CT", "MR"]}


def test_an_export_in_the_releases_layout_names_what_its_loader_cannot_read(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "st", 3, [make_card("alpha", 4)])
    values = np.ones((3, 4), np.float16)
    part = ShardFeatures(values, values, np.array([3, 1, 0], np.uint8))
    write_shard(store, make_card("alpha", 4), 0, part, read_part(tmp_path / "st", 0)[1])
    report = export_original(FeatureStore.open(tmp_path / "st"), tmp_path / "out", allow_loss=["all"])
    assert (report.samples, report.incomplete, report.left_out) == (2, 1, 1)


def test_keys_that_would_be_one_folder_are_refused(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 2, [make_card()])
    write_part(tmp_path / "st", 0, with_columns(read_part(tmp_path / "st", 0)[0], {"key": ["a/b/c", "a_b/c"]}))
    with pytest.raises(CorpusError, match="key 'a_b/c' and another one would both be written to"):
        export_original(FeatureStore.open(tmp_path / "st"), tmp_path / "out", allow_loss=["all"])


def test_columns_of_one_name_are_named(tmp_path: Path) -> None:
    table = pa.table({"status": ["x"], "metadata_status": ["y"]})
    with pytest.raises(CorpusError, match="two columns would become 'metadata_status'"):
        _ = clip_folder(tmp_path / "in", table, np.ones((1, 2), np.float32)).labels


def test_labels_named_as_columns_of_the_layout_come_back(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 3, [make_card()])
    store = FeatureStore.open(tmp_path / "st")
    source = StoreRows([(store, np.arange(3))])
    source.labels = ("site", "image_path", "metadata_status")
    rows = [row | {"image_path": f"p{i}", "metadata_status": f"s{i}"} for i, row in enumerate(source.rows())]
    source.rows = lambda: iter(rows)  # type: ignore[method-assign]
    import_features(source, tmp_path / "named", None, silent)
    named = FeatureStore.open(tmp_path / "named")
    export_npy(named, tmp_path / "npy")
    import_features(ClipRetrievalFolder(tmp_path / "npy/alpha", "m"), tmp_path / "back", None, silent)
    assert FeatureStore.open(tmp_path / "back").sample_table().equals(named.sample_table())


def replaced(path: Path, how: str) -> None:
    """Put a folder, a pipe or a dangling link in place of a file."""
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")


READS: dict[str, Callable[[Path], object]] = {
    "zarr.json": FeatureStore.open,
    "teachers/alpha/zarr.json": FeatureStore.open,
    "ledger/00000.alpha.json": lambda root: FeatureStore.open(root).ledger,
    "samples/00000.parquet": lambda root: FeatureStore.open(root).sample_table(),
    "teachers/alpha/image/loose/00000": lambda root: np.asarray(FeatureStore.open(root).image("alpha")),
    "teachers/alpha/valid/loose/00000": lambda root: FeatureStore.open(root).valid("alpha"),
    "selections/half/zarr.json": lambda root: FeatureStore.open(root).available("half"),
    "selections/half/c/0/0": lambda root: FeatureStore.open(root).available("half"),
}


@pytest.mark.integration
@pytest.mark.parametrize("how", ["folder", "pipe", "link"])
@pytest.mark.parametrize("name", READS)
def test_what_is_no_file_is_not_absent(tmp_path: Path, name: str, how: str) -> None:
    root = tmp_path / "st"
    cards = [make_card("alpha", 64)]
    store, _ = make_store(root, 300, cards)
    make_selection(store, "half", np.ones((300, 1), bool), cards)
    replaced(root / name, how)
    with pytest.raises(MmkdError):
        READS[name](root)
    if name != "zarr.json":
        assert not verify(root).sound


def test_a_teacher_whose_card_was_not_copied_is_named(tmp_path: Path) -> None:
    make_store(tmp_path / "st", 300, [make_card("alpha"), make_card("beta")])
    shutil.rmtree(tmp_path / "st/teachers/beta")
    store = FeatureStore.open(tmp_path / "st")
    with pytest.raises(CorruptStoreError, match="entries of teacher beta, but no card"):
        store.available()


def test_features_without_the_ledger_are_a_copy_that_is_not_whole(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "st", 300, [make_card("alpha")])
    fold(store)
    shutil.copytree(tmp_path / "st/ledger", tmp_path / "ledger")
    shutil.rmtree(tmp_path / "st/ledger")
    for act in (lambda store: store.valid("alpha"), lambda store: store.summary(), lambda store: store.image("alpha")):
        with pytest.raises(
            CorruptStoreError, match="not copied whole: it has teachers/alpha/valid/c and no folder ledger"
        ):
            act(FeatureStore.open(tmp_path / "st"))
    (tmp_path / "st/ledger").mkdir()  # a repair that dropped every entry leaves this
    assert not FeatureStore.open(tmp_path / "st").valid("alpha").any()
    shutil.copytree(tmp_path / "ledger", tmp_path / "st/ledger", dirs_exist_ok=True)
    assert FeatureStore.open(tmp_path / "st").valid("alpha").all()


def test_half_copied_selections_and_inputs_are_named(tmp_path: Path) -> None:
    cards = [make_card()]
    store, _ = make_store(tmp_path / "st", 300, cards)
    make_selection(store, "half", np.ones((300, 1), bool), cards)
    assert verify(tmp_path / "st").orphans == ()
    (tmp_path / "st/selections/half/zarr.json").unlink()
    (tmp_path / "st/inputs").mkdir()
    (tmp_path / "st/inputs/00001.arrow").write_bytes(b"x")
    assert set(verify(tmp_path / "st").orphans) == {"selections/half/c/0/0", "inputs/00001.arrow"}


def test_inputs_of_a_store_that_moved_are_not_none(tmp_path: Path) -> None:
    store, _ = make_store(tmp_path / "st", 3, [])
    (tmp_path / "st").rename(tmp_path / "moved")
    with pytest.raises(NotAStoreError, match="moved or deleted"):
        Inputs(store)


@pytest.mark.parametrize("key", ["..", "a/..", "a\0b", "folder/a\0b"])
def test_a_key_that_cannot_name_a_folder_is_refused(tmp_path: Path, key: str) -> None:
    make_store(tmp_path / "st", 1, [make_card()])
    write_part(tmp_path / "st", 0, with_columns(read_part(tmp_path / "st", 0)[0], {"key": [key]}))
    with pytest.raises(CorpusError, match="cannot name a folder of the release's layout"):
        export_original(FeatureStore.open(tmp_path / "st"), tmp_path / "out", allow_loss=["all"])


def test_labels_without_a_name_and_of_bytes_keep_their_values(tmp_path: Path) -> None:
    table = pa.table({"": ["x", None], "raw": [b"\xff\x00", b"a"], "many": [[b"\xff"], None]})
    import_features(clip_folder(tmp_path / "in", table, np.ones((2, 2), np.float32)), tmp_path / "st", None, silent)
    found = FeatureStore.open(tmp_path / "st").sample_table()
    assert found[""].to_pylist() == ["x", None]
    assert found["raw"].to_pylist() == ["ff00", "61"]
    assert found["many"].to_pylist() == ['["ff"]', None]
