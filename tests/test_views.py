"""Views: drawn alike by whoever draws them, extracted as rows of their own, each image decoded once for all of them."""

from __future__ import annotations

import io
import math
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from image_teacher import Seer
from in_process import extracted, load, run, tree_digest
from PIL import Image, ImageOps
from tiny_corpus import write_table_corpus
from tiny_teachers import write_tiny_teacher

from mmkd.base.errors import ConfigError, CorpusError, UserError
from mmkd.base.images.corruptions import find_corruptions
from mmkd.base.images.decoding import decode
from mmkd.base.images.recipe import parse_recipe, read_recipe
from mmkd.base.images.views import View, Views, draw
from mmkd.cli.main import cli
from mmkd.extract import decoding
from mmkd.extract.corpora import open_corpus
from mmkd.extract.derived import append_pictures, restore_pictures
from mmkd.extract.encode import Workbench
from mmkd.extract.index import append_corpus, create_indexed_store, restore_parts
from mmkd.extract.shard import SOURCE_COLUMNS, image_sources, retry_shard
from mmkd.extract.teachers import Teacher
from mmkd.extract.teachers.geometry import geometry_of, pixels_of
from mmkd.store import FeatureStore
from mmkd.store.inputs import shards_without_inputs
from mmkd.store.inspect.neighbors import neighbors
from mmkd.store.inspect.pictures import picture
from mmkd.store.inspect.rows import sample_rows
from mmkd.store.inspect.show import view_row
from mmkd.store.ledger import read_ledger
from mmkd.store.record import Store
from mmkd.store.samples import read_part

CODECS = {"PNG": {}, "JPEG": {"quality": 80}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG2000": {}}
JITTER = Views(count=4, seed=3, area=(0.1, 0.9), flip=True, brightness=0.4, contrast=0.4, saturation=0.4)


def encoded(codec: str, mode: str, width: int, height: int, seed: int) -> bytes:
    """A picture of noise as a file."""
    channels = (3,) if mode == "RGB" else ()
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, codec, **CODECS[codec])
    return buffer.getvalue()


def by_hand(recipe: Views, key: str, number: int, picture: Image.Image) -> np.ndarray:
    """A view after the specification in docs/format.md, in loops and NumPy."""
    digest = blake2b(f"{recipe.seed} {number} {key}".encode(), digest_size=56).digest()
    u = [(int.from_bytes(digest[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(7)]
    area = recipe.area[0] + u[0] * (recipe.area[1] - recipe.area[0])
    side = max(1, round(min(picture.size) * math.sqrt(area)))
    left, top = (min(math.floor(u[i + 1] * (picture.size[i] - side + 1)), picture.size[i] - side) for i in (0, 1))
    values = np.asarray(picture).astype(np.int64)[top : top + side, left : left + side]
    values = values[:, ::-1] if recipe.flip and u[3] < 0.5 else values
    factors = [1 + (2 * u[4 + i] - 1) * (recipe.brightness, recipe.contrast, recipe.saturation)[i] for i in range(3)]

    def gray(colors: np.ndarray) -> np.ndarray:
        if colors.ndim == 2:
            return colors
        return (colors @ np.array([19595, 38470, 7471]) + 0x8000) >> 16

    if factors[:2] != [1.0, 1.0]:
        mean = int(gray(values).sum()) / gray(values).size
        values = np.floor((mean + (values - mean) * factors[1]) * factors[0] + 0.5).clip(0, 255).astype(np.int64)
    if factors[2] != 1.0 and values.ndim == 3:
        share = round(256 * factors[2])
        values = ((values * share + gray(values)[..., None] * (256 - share) + 128) // 256).clip(0, 255)
    return values


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(CODECS)),
    st.sampled_from(["L", "RGB"]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 2**64),
    st.text(max_size=8),
    st.booleans(),
    st.tuples(*[st.sampled_from([0.0, 0.3, 1.0])] * 3),
)
def test_a_view_is_the_same_wherever_it_is_drawn(
    codec: str, mode: str, width: int, height: int, seed: int, key: str, flip: bool, colors: tuple[float, ...]
) -> None:
    data = encoded(codec, mode, width, height, seed % 1000)
    jitter = dict(zip(("brightness", "contrast", "saturation"), colors, strict=True))
    recipe = Views(count=3, seed=seed, area=(0.05, 1.0), flip=flip, **jitter)
    again = read_recipe({"corpus": 0, **recipe.model_dump(mode="json")}, "the record")
    for number in (1, 2, 3):
        view = recipe.picture(decode(data), key, number)
        assert (view.mode, view.tobytes()) == (decode(data).mode, again.picture(decode(data), key, number).tobytes())
        assert np.array_equal(np.asarray(view), by_hand(recipe, key, number, decode(data)))


def test_views_of_a_recipe_differ_and_keep_within_it() -> None:
    drawn = [draw(JITTER, f"k{i}", number) for i in range(500) for number in (1, 2)]
    assert len(set(drawn)) == 1000
    for low, high, values in (
        (0.1, 0.9, [view.area for view in drawn]),
        (0.6, 1.4, [view.brightness for view in drawn]),
        (0.6, 1.4, [view.contrast for view in drawn]),
        (0.6, 1.4, [view.saturation for view in drawn]),
        (0.0, 1.0, [view.place[0] for view in drawn]),
        (0.0, 1.0, [view.place[1] for view in drawn]),
    ):
        assert low <= min(values) < low + 0.05 < high - 0.05 < max(values) <= high
        assert abs(np.mean(values) - (low + high) / 2) < 0.03
    assert 0.4 < np.mean([view.flip for view in drawn]) < 0.6
    plain = View(1.0, (0.5, 0.5), flip=True, brightness=1.0, contrast=1.0, saturation=1.0)
    picture = decode(encoded("PNG", "RGB", 40, 30, 1))
    assert plain.box(40, 30) == (5, 0, 35, 30)
    assert plain.apply(picture).tobytes() == ImageOps.mirror(picture.crop((5, 0, 35, 30))).tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"count": 0}, "views.yaml: count: Input should be greater than 0"),
        ({"count": 2, "area": [0.5, 0.2]}, r"views.yaml: area: area is \[0.5, 0.2\], expected two shares above 0"),
        ({"count": 2, "seeds": 1}, "views.yaml: seeds: unknown key; did you mean 'seed'"),
        ({"seed": 1}, "views.yaml: count: Field required"),
        ({"kind": ["x"], "count": 2}, r"views.yaml: kind is \['x'\], expected 'views'; leave it out, or name another"),
        ({"kind": "corruptions", "count": 2}, "views.yaml: kind is 'corruptions', expected 'views'; leave it out"),
    ],
)
def test_a_recipe_that_cannot_be(tmp_path: Path, content: dict[str, object], message: str) -> None:
    (tmp_path / "views.yaml").write_text(str(content))
    with pytest.raises(ConfigError, match=message):
        parse_recipe("views", str(tmp_path / "views.yaml"))


def test_what_is_no_number_and_no_file() -> None:
    assert parse_recipe("views", "3") == Views(count=3)
    with pytest.raises(ConfigError, match="--views is 'many', expected a number of pictures, or a YAML file"):
        parse_recipe("views", "many")
    with pytest.raises(UserError, match="kind 'dreams' is not among corruptions, views; install a newer mmkd"):
        read_recipe({"kind": "dreams", "count": 1}, "the store")
    with pytest.raises(UserError, match=r"kind \['x'\] is not among corruptions, views"):
        read_recipe({"kind": ["x"], "count": 1}, "the store")


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """One with two towers, one with an image tower."""
    folder = write_tiny_teacher(tmp_path_factory.mktemp("t") / "one", seed=1)
    return load({"one": folder}, "one") | {"seer": Seer()}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, teachers: dict[str, Teacher]) -> Path:
    """90 pairs, of which one has no image, one a damaged one and one a key of before; the store `s` of five views."""
    root = tmp_path_factory.mktemp("views")
    table = write_table_corpus(root / "corpus", 90)
    lines = table.read_text().splitlines()
    lines[12] = lines[12].replace("images/11.png", "")
    lines[31] = lines[31].replace("k30,", "k29,")
    table.write_text("\n".join(lines) + "\n")
    (root / "corpus/images/20.png").write_bytes(b"no image")
    extracted(table, root / "s", teachers, JITTER.model_copy(update={"count": 5}))
    return root


def test_views_are_rows_of_their_own(scene: Path, teachers: dict[str, Teacher]) -> None:
    store = FeatureStore.open(scene / "s")
    assert store.verify(deep=True).sound
    images = [row for row in range(90) if row not in (11, 30)]
    assert [span.rows for span in store.record.spans()] == [range(90), range(256, 256 + 5 * 88)]
    corpus = store.record.appended[0]
    assert (corpus.kind, corpus.towers, corpus.rows, corpus.root) == (
        "views",
        ("image",),
        440,
        store.record.corpus.root,
    )
    assert corpus.recipe == {"corpus": 0, **JITTER.model_dump(mode="json"), "count": 5}
    table = store.sample_table().slice(256).to_pylist()
    assert [row["image_rows"] for row in table] == [[row] for row in images for _ in range(5)]
    assert [row["view_number"] for row in table] == [1, 2, 3, 4, 5] * 88
    assert [row["key"] for row in table[:2]] == ["k0#views-1", "k0#views-2"]
    assert {row["status"] for row in table} == {"ok", "failed"}
    failed = [row for row in table if row["status"] == "failed"]
    assert {(row["image_rows"][0], row["reason"]) for row in failed} == {(20, "image: not an image that Pillow knows")}
    assert len(failed) == 5
    for slug, wanted in (("one", 3), ("seer", 1)):
        valid = store.valid(slug)
        assert set(valid[:90]) <= {0, 1, 2, wanted}
        assert (valid[256:696] == [row["status"] == "ok" for row in table]).all()
    entry = read_ledger(store.root)[1, "one"]
    assert (entry.image_rows, entry.text_rows, entry.text_crc32c) == (251, None, None)


def test_features_are_those_of_the_teacher_on_the_replayed_view(scene: Path, teachers: dict[str, Teacher]) -> None:
    store = FeatureStore.open(scene / "s")
    recipe = read_recipe(store.record.appended[0].recipe or {}, "the store")
    for slug, teacher in teachers.items():
        geometry = geometry_of(teacher.card.image_preprocessing)
        for row in (256, 260, 300, 600, 690):
            sample = store.sample_table(["image_rows", "view_number"]).slice(row, 1).to_pylist()[0]
            about = store.sample_table(["key", "uri"]).slice(sample["image_rows"][0], 1).to_pylist()[0]
            image = decode((scene / "corpus" / about["uri"]).read_bytes())
            view = recipe.picture(image, about["key"], sample["view_number"])
            live = teacher.encode_images(torch.from_numpy(pixels_of(view, [geometry])[geometry])[None])[0]
            kept = torch.from_numpy(store.image(slug)[row].astype(np.float32))
            assert torch.nn.functional.cosine_similarity(live.float(), kept, dim=0) >= 0.9999
            centre = torch.from_numpy(store.image(slug)[sample["image_rows"][0]].astype(np.float32))
            assert torch.nn.functional.cosine_similarity(live.float(), centre, dim=0) < 0.9999


def test_an_image_is_read_and_decoded_once_for_its_views(
    scene: Path, tmp_path: Path, teachers: dict[str, Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(decoding, "decode", lambda data: decoded.append(data) or decode(data))
    extracted(scene / "corpus/pairs.csv", tmp_path / "s", teachers, JITTER.model_copy(update={"count": 5}), threads=1)
    # Rows 51 and 52 of the images with views are divided by the boundary of the two view shards at row 512.
    assert len(decoded) == 88 + 88 + 1


@pytest.mark.slow
def test_bytes_are_the_same_however_they_came_about(scene: Path, tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    recipe, table = JITTER.model_copy(update={"count": 5}), scene / "corpus/pairs.csv"
    expected = tree_digest(scene / "s")
    late = run(table, tmp_path / "late", teachers, threads=1)
    assert len(late) == 90
    extracted(table, tmp_path / "late", teachers, recipe, threads=5)
    extracted(table, tmp_path / "one-by-one", {"seer": teachers["seer"]}, recipe)
    extracted(table, tmp_path / "one-by-one", teachers, recipe)
    for name in ("late", "one-by-one"):
        assert tree_digest(tmp_path / name) == expected
    store, sources = Store.open(scene / "s"), []
    part, _ = read_part(store.root, 2)
    sources = image_sources(part.select(SOURCE_COLUMNS), [True] * len(part), store.record)
    bench = Workbench(isolated=True)
    geometry = geometry_of(teachers["seer"].card.image_preprocessing)
    isolated = [image for window in bench.windows(sources[:7], [geometry], 3) for image in window]
    here = [image for window in Workbench().windows(sources[:7], [geometry], 4) for image in window]
    assert [image.pixels[geometry].tobytes() for image in isolated] == [one.pixels[geometry].tobytes() for one in here]


def test_another_recipe_is_refused_in_one_line(scene: Path) -> None:
    for recipe, what in (
        (JITTER, "count 5, not 4"),
        (JITTER.model_copy(update={"count": 5, "seed": 9}), "seed 3, not 9"),
        (Views(count=5, seed=3), r"area \[0.1, 0.9\], not \[0.5, 1.0\]"),
    ):
        with pytest.raises(UserError, match=f"s has views with {what}; ask for the same, or name a new store"):
            append_pictures(Store.open(scene / "s"), recipe, lambda line: None)


def test_texts_alone_have_no_views(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("key,caption\na,one\nb,two\n")
    store = create_indexed_store(open_corpus(str(tmp_path / "texts.csv")), tmp_path / "s")
    for recipe in (Views(count=2), find_corruptions("ct")):
        what = f"{recipe.kind} can be made of; leave {recipe.option} out"
        with pytest.raises(CorpusError, match=f"s has no image that {what}"):
            append_pictures(store, recipe, lambda line: None)


def test_each_corpus_of_a_store_has_its_views(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    tables = [write_table_corpus(tmp_path / name, 20) for name in ("a", "b")]
    tables[1].write_text(tables[1].read_text().replace("\nk", "\nother"))
    extracted(tables[0], tmp_path / "s", {"seer": teachers["seer"]}, Views(count=2))
    assert CliRunner().invoke(cli, ["store", "append", str(tmp_path / "s"), str(tables[1])]).exit_code == 0
    said: list[str] = []
    append_pictures(Store.open(tmp_path / "s"), Views(count=2), said.append)
    append_pictures(Store.open(tmp_path / "s"), Views(count=2), said.append)
    assert said == ["views: 2 of each of 20 images, rows 768 to 807"]
    store = run(tables[1], tmp_path / "s", {"seer": teachers["seer"]})
    assert store.verify(deep=True).sound
    assert store.sample_table(["image_rows"]).slice(768, 1).to_pylist() == [{"image_rows": [512]}]
    assert (store.valid("seer")[768:808] == 1).all()
    # Images that move take their views along.
    (tmp_path / "b").rename(tmp_path / "moved")
    moved = ["store", "relocate", str(tmp_path / "s"), str(tmp_path / "moved"), "--corpus", "2"]
    assert CliRunner().invoke(cli, moved).exit_code == 0
    assert [Path(span.corpus.root).name for span in Store.open(tmp_path / "s").record.spans()] == [
        *("a", "a", "moved", "moved")
    ]


def test_pictures_wait_for_a_corpus_that_is_missing_too(tmp_path: Path) -> None:
    tables = [write_table_corpus(tmp_path / name, 5) for name in ("a", "b")]
    tables[1].write_text(tables[1].read_text().replace("\nk", "\nother"))
    create_indexed_store(open_corpus(str(tables[0])), tmp_path / "s")
    append_corpus(open_corpus(str(tables[1])), tmp_path / "s")
    store = append_pictures(Store.open(tmp_path / "s"), Views(count=2), lambda line: None)
    before, said = tree_digest(tmp_path / "s"), list[str]()
    for shard in (0, 2, 3):  # the first corpus, and all views
        (tmp_path / f"s/samples/{shard:05d}.parquet").unlink()
    assert restore_pictures(store, said.append) == 0
    assert said == [
        f"sample parts of views of {table} stay missing until those of {tables[0]} are there: "
        f"`mmkd extract {tables[0]} {tmp_path / 's'}` lists them"
        for table in tables
    ]
    assert restore_parts(open_corpus(str(tables[0])), store) + restore_pictures(store, said.append) == 3
    assert tree_digest(tmp_path / "s") == before


def test_a_retry_brings_the_views_of_an_image_too(tmp_path: Path, teachers: dict[str, Teacher]) -> None:
    table = write_table_corpus(tmp_path / "corpus", 30)
    extracted(table, tmp_path / "whole", teachers, JITTER)
    hidden = tmp_path / "corpus/images/9.png"
    data = hidden.read_bytes()
    hidden.unlink()
    extracted(table, tmp_path / "s", teachers, JITTER)
    hidden.write_bytes(data)
    store = Store.open(tmp_path / "s")
    for shard in (0, 1):
        assert retry_shard(store, shard, teachers, Workbench()).rows == (1, 4)[shard]
    assert tree_digest(tmp_path / "s") == tree_digest(tmp_path / "whole")


def test_training_inputs_are_kept_of_images_and_not_of_views(scene: Path) -> None:
    assert shards_without_inputs(Store.open(scene / "s"), 64) == {0}


def test_a_view_is_shown_as_it_was_drawn(scene: Path) -> None:
    store = FeatureStore.open(scene / "s")
    (row,) = sample_rows(store, [256 + 5 * 7 + 2]).to_pylist()
    assert row["key"] == "k7#views-3"
    original = decode((scene / "corpus/images/7.png").read_bytes())
    expected = draw(JITTER, "k7", 3).apply(original)
    assert picture(store.record, row).tobytes() == expected.tobytes()


def test_no_view_is_a_neighbor(scene: Path) -> None:
    store = FeatureStore.open(scene / "s")
    near = view_row(store, 0, ["seer"]).teachers[0].neighbors
    assert len(near) == 5
    assert all(0 < one.row < 90 for one in near)
    found = neighbors(store, "seer", "image", store.image("seer")[256], 90)  # a view's feature
    assert sorted(found["row"].to_pylist()) == [row for row in range(90) if row not in (11, 20, 30)]


def test_no_count_or_statistic_takes_views_for_images(scene: Path, tmp_path: Path) -> None:
    def said(*arguments: object) -> str:
        result = CliRunner().invoke(cli, ["store", *map(str, arguments)])
        return result.output if result.exit_code == 0 else str(result.exception)

    assert "; of these 440 views) in 3 shards of 256" in said("info", scene / "s")
    stats = said("stats", scene / "s", "--sample", "all")
    assert "s: every row; left out: 440 views" in stats
    assert "whole store: 0 repeated images" in stats
    assert [line.split()[2] for line in stats.splitlines() if line.split()[1:2] == ["image"]] == ["87", "87"]
    assert [line.split()[1:3] for line in stats.splitlines() if line.split()[:1] == ["site"]] == [["90", "0"]]
    assert "one (not extracted)" not in said("show", scene / "s", "row:260")
    line = (
        "row 256 of {0} is a view or a caption of other rows, which {1} has no place for; `mmkd store subset {0} NEW "
        '--where "image_rows is null"` leaves such rows out'
    )
    refused = line.format(scene / "s", "the new store")
    assert said("subset", scene / "s", tmp_path / "a", "--where", "modality = 'CT'") == refused
    assert said("merge", scene / "s", tmp_path / "a") == refused
    exported = said("export", scene / "s", tmp_path / "a", "--layout", "original", "--allow-loss", "all")
    assert exported == line.format(scene / "s", "the release's layout")
    assert "90 rows in" in said("subset", scene / "s", tmp_path / "b", "--where", "image_rows is null")
    assert "equal: rows, teachers and selections" in (
        said("pull", scene / "s", tmp_path / "c") + said("diff", scene / "s", tmp_path / "c")
    )
