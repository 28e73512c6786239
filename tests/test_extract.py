"""One shard after another, without Dask: values, failures, identical bytes, resuming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from in_process import load, run, tree_digest
from PIL import Image
from tiny_corpus import png, write_table_corpus, write_tar_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import TeacherError, TeacherMismatchError
from mmkd.extract.corpora import corpus_rows, open_corpus
from mmkd.extract.encode import Workbench
from mmkd.extract.index import create_indexed_store
from mmkd.extract.plan import plan_tasks
from mmkd.extract.shard import extract_shard
from mmkd.store import IMAGE_SOUND, TEXT_SOUND, FeatureStore
from mmkd.store.record import Store
from mmkd.store.writer import add_teacher


@pytest.fixture(scope="module")
def teacher_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny open_clip folders: `one` 24 wide at 32 px, `two` 32 wide at 48 px."""
    root = tmp_path_factory.mktemp("teachers")
    return {
        "one": write_tiny_teacher(root / "one", seed=1),
        "two": write_tiny_teacher(root / "two", seed=2, embed_dim=32, image_size=48),
    }


def test_features_are_those_of_open_clip(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    table = write_table_corpus(tmp_path / "c", 5)
    store = run(table, tmp_path / "s", load(teacher_folders, "one", "two"))
    for slug, folder in teacher_folders.items():
        model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        rows = list(corpus_rows(open_corpus(str(table))))
        with torch.no_grad():
            pixels = torch.stack([preprocess(Image.open(table.parent / row.uri)) for row in rows])
            image = model.encode_image(pixels).numpy()
            text = model.encode_text(tokenizer([row.caption for row in rows])).numpy()
        scale = np.abs(image).max()
        assert np.allclose(store.image(slug), image, atol=scale * 2e-3)
        assert np.allclose(store.text(slug), text, atol=np.abs(text).max() * 2e-3)
        # The five pictures differ by far more than the tolerance, so a swap of rows would be seen.
        assert np.abs(image[0] - image[1]).max() > scale * 0.05
        assert np.abs(text[0] - text[1]).max() > np.abs(text).max() * 0.05


@pytest.mark.integration
def test_bad_inputs_cost_their_own_rows_only(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    table = write_table_corpus(tmp_path / "c", 12)
    images = table.parent / "images"
    (images / "1.png").write_bytes(png(1)[:300])
    (images / "2.png").write_bytes(b"")
    (images / "3.png").write_bytes(b"GIF? no, a text file")
    Image.new("1", (20_000, 20_000)).save(images / "4.png")
    (images / "5.png").unlink()
    lines = table.read_bytes().replace(b"k6,images/6.png,finding 6 seen in plane 1", b"k6,images/6.png,   ")
    lines = lines.replace(b"finding 7 seen", b"f\xefnding 7 seen").replace(b"k8,", b"k0,")
    lines = lines.replace(b"k9,images/9.png", b"k9,").replace(
        b"k10,images/10.png,finding 10 seen in plane 0", b"k10,images/5.png,"
    )
    table.write_bytes(lines)

    store = run(table, tmp_path / "s", load(teacher_folders, "one"))
    rows = store.sample_table(columns=["key", "status", "reason"]).to_pylist()
    assert [(row["key"], row["status"], row["reason"]) for row in rows] == [
        ("k0", "ok", None),
        ("k1", "partial", "image: truncated"),
        ("k2", "partial", "image: empty file"),
        ("k3", "partial", "image: not an image that Pillow knows"),
        ("k4", "partial", "image: more than 134,217,728 pixels"),
        ("k5", "partial", "image: file not found"),
        ("k6", "partial", "caption: empty"),
        ("k7", "partial", "caption: not UTF-8"),
        ("k0", "failed", "key: duplicate of row 0"),
        ("k9", "partial", "pair: no image"),
        ("k10", "failed", "image: file not found; caption: empty"),
        ("k11", "ok", None),
    ]
    both = IMAGE_SOUND | TEXT_SOUND
    expected = [both, *[TEXT_SOUND] * 5, IMAGE_SOUND, IMAGE_SOUND, 0, TEXT_SOUND, 0, both]
    assert store.valid("one").tolist() == expected
    finite = np.isfinite(store.image("one")).all(axis=1)
    assert finite.tolist() == [bool(bits & IMAGE_SOUND) for bits in expected]
    assert store.verify().sound

    # What is left is exactly what a corpus without the bad inputs would have given.
    clean = run(write_table_corpus(tmp_path / "clean", 12), tmp_path / "t", load(teacher_folders, "one"))
    assert np.array_equal(store.image("one")[[0, 6, 7, 11]], clean.image("one")[[0, 6, 7, 11]])


def test_a_tar_that_ends_inside_an_image(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    tar = write_tar_corpus(tmp_path / "tars", 6, per_tar=6) / "00000.tar"
    rows = list(corpus_rows(open_corpus(str(tar))))
    assert rows[3].offset is not None
    tar.write_bytes(tar.read_bytes()[: rows[3].offset + 10])
    store = run(tar, tmp_path / "s", load(teacher_folders, "one"))
    assert store.sample_table(columns=["status", "reason"]).to_pylist()[-2:] == [
        {"status": "failed", "reason": "image: archive ends inside this member; pair: no caption"},
        {"status": "failed", "reason": "archive: ends early or is damaged, what follows is lost"},
    ]
    assert store.available()[:, 0].tolist() == [True, True, True, False, False]


def test_table_and_tar_of_the_same_pictures_give_the_same_image_features(
    tmp_path: Path, teacher_folders: dict[str, Path]
) -> None:
    teachers = load(teacher_folders, "one")
    table = run(write_table_corpus(tmp_path / "c", 40), tmp_path / "s", teachers)
    tars = run(write_tar_corpus(tmp_path / "tars", 40, per_tar=7), tmp_path / "t", teachers)
    assert np.array_equal(table.image("one"), tars.image("one"))


@pytest.mark.integration
def test_bytes_do_not_depend_on_threads_company_or_interruption(
    tmp_path: Path, teacher_folders: dict[str, Path]
) -> None:
    table = write_table_corpus(tmp_path / "c", 300)
    both = load(teacher_folders, "one", "two")
    run(table, tmp_path / "a", both, threads=1)
    expected = tree_digest(tmp_path / "a")
    run(table, tmp_path / "b", both, threads=4)
    assert tree_digest(tmp_path / "b") == expected
    # One teacher first, the other added later, with a shard lost in between.
    run(table, tmp_path / "d", load(teacher_folders, "two"))
    (tmp_path / "d" / "ledger" / "00001.two.json").unlink()
    run(table, tmp_path / "d", both)
    assert tree_digest(tmp_path / "d") == expected


def test_finished_shards_are_not_done_again(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    teachers = load(teacher_folders, "one")
    table = write_table_corpus(tmp_path / "c", 300)
    store = run(table, tmp_path / "s", teachers)
    assert plan_tasks(store.record, [teachers["one"].card], store.ledger) == []
    (tmp_path / "s" / "ledger" / "00000.one.json").unlink()
    tasks = plan_tasks(store.record, [teachers["one"].card], FeatureStore.open(tmp_path / "s").ledger)
    assert [(task.shard, task.teachers) for task in tasks] == [(0, ("one",))]


def test_an_image_that_changed_is_missing_for_a_later_teacher(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    table = write_table_corpus(tmp_path / "c", 8)
    run(table, tmp_path / "s", load(teacher_folders, "one"))
    before = (tmp_path / "s/samples/00000.parquet").read_bytes()
    (table.parent / "images" / "5.png").write_bytes(png(99))
    store = run(table, tmp_path / "s", load(teacher_folders, "two"))
    assert store.available()[:, 0].all()
    assert store.available()[:, 1].tolist() == [True] * 5 + [False] + [True] * 2
    assert (tmp_path / "s/samples/00000.parquet").read_bytes() == before
    assert store.verify().sound


def test_other_weights_under_the_same_name_are_refused(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    table = write_table_corpus(tmp_path / "c", 4)
    store = run(table, tmp_path / "s", load(teacher_folders, "one"))
    other = load({"one": write_tiny_teacher(tmp_path / "other", seed=9)}, "one")["one"].card
    with pytest.raises(TeacherMismatchError, match=other.digest):
        add_teacher(store, other)
    with pytest.raises(TeacherMismatchError, match=other.digest):
        plan_tasks(store.record, [other], store.ledger)


def test_a_teacher_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_teacher(tmp_path / "t", seed=1)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(TeacherError) as caught:
        load({"t": folder}, "t")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_captions_are_cut_and_counted(tmp_path: Path, teacher_folders: dict[str, Path]) -> None:
    table = tmp_path / "pairs.csv"
    teachers = load(teacher_folders, "one")
    fits = teachers["one"].card.context_length - 2  # words beside the start and the end
    counts = {"b": 40, "c": 200_000, "d": fits, "e": fits + 1}
    table.write_text("key,caption\na,short\n" + "".join(f"{key},{'word ' * n}\n" for key, n in counts.items()))
    create_indexed_store(open_corpus(str(table)), tmp_path / "s")
    record = FeatureStore.open(tmp_path / "s").record
    add_teacher(Store(tmp_path / "s", record), teachers["one"].card)
    report = extract_shard(Store(tmp_path / "s", record), 0, teachers, Workbench())
    assert report.truncated == {"one": 3}
    text = FeatureStore.open(tmp_path / "s").text("one")
    for row in (2, 3, 4):
        assert np.array_equal(text[1], text[row])  # the context full of the same word
    assert not np.array_equal(text[0], text[1])
