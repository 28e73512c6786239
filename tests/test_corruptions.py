"""Corruptions: every effect against a definition written otherwise, suites, features in a store, and what they cost."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from click.testing import CliRunner
from image_teacher import Seer
from in_process import load, run
from PIL import Image
from scipy import ndimage
from skimage.color import hsv2rgb, rgb2hsv
from tiny_corpus import picture
from tiny_store import make_card
from tiny_teachers import write_tiny_teacher
from torchvision.transforms.functional import gaussian_blur as torchvision_blur

from mmkd.base.errors import ConfigError, MmkdError, UserError
from mmkd.base.images.corruptions import HERE, SEVERITIES, Corruptions, find_corruptions
from mmkd.base.images.corruptions.effects import CT_NOISE, EFFECTS, HED
from mmkd.base.images.recipe import read_recipe
from mmkd.base.images.source import ImageError
from mmkd.cli.evaluate import evaluate
from mmkd.evaluate import load_suite
from mmkd.evaluate.corruptions import corrupted_rows, measure_corruptions
from mmkd.evaluate.dataset import Samples, load_dataset
from mmkd.evaluate.features import Features
from mmkd.evaluate.pages import corruption_figure, write_corruptions
from mmkd.evaluate.tasks import TASKS
from mmkd.extract.corpora import open_corpus
from mmkd.extract.derived import append_pictures
from mmkd.extract.index import create_indexed_store
from mmkd.store import FeatureStore
from mmkd.store.record import CorpusRecord, Store
from mmkd.store.samples import read_part, sample_schema
from mmkd.store.writer import ShardFeatures, add_teacher, create_store, write_shard

SHIPPED = sorted(path.stem for path in HERE.glob("*.yaml"))
COLOR, GRAY = picture(3, (90, 70)), picture(3, (90, 70)).convert("L")
FLAT = Image.new("L", (300, 300), 128)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def effect(name: str, image: Image.Image, strength: object, seed: int = 0) -> np.ndarray:
    return values(EFFECTS[name](image, strength, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_keep_mode_and_size_and_do_more_at_each_severity(name: str) -> None:
    suite = find_corruptions(name)
    gray = name in ("ct", "oct", "ultrasound", "xray")
    image = GRAY if gray else COLOR
    found = [suite.picture(image, "key", number) for number in range(1, suite.count + 1)]
    assert {(one.mode, one.size) for one in found} == {(image.mode, image.size)}
    assert [one.tobytes() for one in found] == [
        suite.picture(image, "key", i).tobytes() for i in range(1, suite.count + 1)
    ]
    far = [np.abs(values(one) - values(image)).mean() for one in found]
    for family in suite.families:
        of_family = [one for one, (own, _) in zip(far, suite.conditions, strict=True) if own == family]
        assert of_family[0] > 0 or family == "black_corner", family
        assert of_family[4] > of_family[0], family


def test_what_is_drawn_depends_on_seed_key_and_family_alone() -> None:
    suite = Corruptions(suite="s", families={"gaussian_noise": (0.1,) * 5, "speckle_noise": (0.1,) * 5})
    first = suite.picture(GRAY, "a", 1).tobytes()
    assert first == suite.picture(GRAY, "a", 5).tobytes()
    others = (suite.picture(GRAY, "b", 1), suite.picture(GRAY, "a", 6))
    assert first not in [one.tobytes() for one in (*others, suite.model_copy(update={"seed": 1}).picture(GRAY, "a", 1))]
    assert first == read_recipe({"corpus": 0, **suite.model_dump(mode="json")}, "store").picture(GRAY, "a", 1).tobytes()


def test_larger_pictures_are_resized_first() -> None:
    suite = find_corruptions("general")
    assert suite.picture(COLOR.resize((900, 448)), "k", 1).size == (450, 224)
    assert suite.model_copy(update={"side": None}).picture(COLOR.resize((900, 448)), "k", 1).size == (900, 448)


def test_noise_has_its_size() -> None:
    assert effect("gaussian_noise", FLAT, 0.1).std() == pytest.approx(25.5, rel=0.02)
    assert effect("speckle_noise", FLAT, 0.1).std() == pytest.approx(12.8, rel=0.02)
    assert effect("shot_noise", FLAT, 100).var() == pytest.approx(255**2 * (128 / 255) / 100, rel=0.03)
    impulses = effect("impulse_noise", FLAT, 0.2)
    assert [(impulses == value).mean() for value in (0, 255)] == pytest.approx([0.1, 0.1], abs=0.005)
    noise = effect("dose", FLAT, 0.25) - 128
    assert noise.std() == pytest.approx(255 * CT_NOISE * math.sqrt(3), rel=0.03)
    assert np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1] == pytest.approx(2 / 3, abs=0.02)


def test_blurs_are_convolutions() -> None:
    for kernel in (3, 9, 21):
        blurred = torchvision_blur(torch.from_numpy(values(GRAY))[None], [kernel, kernel])[0].numpy()
        inside = slice(kernel, -kernel)
        assert np.abs(effect("gaussian_blur", GRAY, kernel) - blurred)[inside, inside].max() <= 0.51
    for radius in (2, 3, 7):
        steps = np.arange(-radius, radius + 1)
        circle = (steps[:, None] ** 2 + steps**2 <= radius**2).astype(float)
        expected = ndimage.convolve(values(GRAY), circle / circle.sum(), mode="nearest")
        assert np.abs(effect("defocus_blur", GRAY, radius) - expected).max() <= 0.51
    point = np.zeros((61, 61), np.uint8)
    point[30, 30] = 255
    moved = effect("motion_blur", Image.fromarray(point), (10, 5))
    assert len({tuple(one) for one in np.argwhere(moved)}) > 10
    assert moved.max() == moved[30, 30]
    assert moved.sum() == pytest.approx(255, rel=0.05)
    flat = effect("zoom_blur", FLAT, (1.2, 0.02))
    assert (flat == 128).all()


def test_colors_change_as_their_formulas_say() -> None:
    assert np.abs(effect("gamma", GRAY, 1.6) - 255 * (values(GRAY) / 255) ** 1.6).max() <= 0.5
    assert np.abs(effect("brightness", GRAY, 0.7) - values(GRAY) * 0.7).max() <= 1
    hsv = rgb2hsv(values(COLOR) / 255)
    hsv[..., 1] = (hsv[..., 1] + 0.2).clip(0, 1)
    assert np.abs(effect("saturate", COLOR, 0.2) - 255 * hsv2rgb(hsv)).mean() < 2.5
    for name in ("stain", "scanner"):
        assert np.abs(effect(name, COLOR, 0.0) - values(COLOR).clip(1)).max() <= 1
    gains, powers = 1 + 0.2 * np.random.default_rng(5).uniform(-1, 1, (2, 3))
    expected = (255 * gains * (values(COLOR) / 255) ** powers).clip(0, 255)
    assert np.abs(effect("scanner", COLOR, 0.2, seed=5) - expected).max() <= 0.5


def test_stains_are_unmixed_and_mixed_again() -> None:
    axes = HED / np.linalg.norm(HED, axis=1, keepdims=True)
    amounts = np.random.default_rng(0).uniform(0.1, 0.4, (30, 30, 3))
    image = Image.fromarray(np.rint(255 * 10 ** -(amounts @ axes)).astype(np.uint8))
    rng = np.random.default_rng(7)
    factors, shifts = 1 + 0.2 * rng.uniform(-1, 1, 3), 0.2 * rng.uniform(-1, 1, 3)
    expected = 255 * 10 ** -((amounts * factors + shifts) @ axes)
    assert np.abs(effect("stain", image, 0.2, seed=7) - expected.clip(0, 255)).max() < 4


def test_compression_is_that_of_pillow() -> None:
    file = io.BytesIO()
    COLOR.save(file, "JPEG", quality=15)
    assert (effect("jpeg", COLOR, 15) == values(Image.open(file))).all()
    assert len(np.unique(effect("pixelate", GRAY, 0.1))) <= 9 * 7


@pytest.mark.parametrize("name", ["stain", "scanner", "saturate"])
def test_color_families_refuse_gray(name: str) -> None:
    with pytest.raises(ImageError, match=f"{name} needs a picture in color"):
        effect(name, GRAY, 0.1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"families": {"fog": [1, 2, 3, 4, 5]}}, "no family 'fog'; there are jpeg, pixelate"),
        ({"families": {"jpeg": [9] * 5}, "severities": [1, 6]}, "severity 6 does not exist; expected some"),
        ({"families": {"jpeg": [9] * 4}}, "jpeg has 4 strengths, expected one for each severity"),
        *(
            (
                {"families": {name: [strength] * 5}},
                f"{name} cannot have the strength {re.escape(str(strength))}: expected {expected}",
            )
            for name, strength, expected in (
                ("jpeg", 500, "a whole number from 1 to 100"),
                ("jpeg", True, "a whole number from 1 to 100"),
                ("jpeg", 9.5, "a whole number from 1 to 100"),
                ("shot_noise", 0, "a number from 0.1 to 1e"),
                ("gaussian_noise", math.nan, "a number from 0 to 10"),
                ("gamma_up", [1], "a number from 0.01 to 100"),
                ("zoom_blur", 1.1, "a list: a number from 1 to 10 and a number from 0.001 to 1"),
                ("zoom_blur", [1.1, 0], "a list: a number from 1 to 10 and a number from 0.001 to 1"),
                ("characters", [3], "a list: a whole number from 1 to 1000 and a whole number from 3 to 100"),
            )
        ),
        ({"families": {"jpeg": [9, 9, 9, 9, "bad"]}}, "jpeg cannot have the strength 'bad': expected a whole number"),
        ({"kind": "views", "count": 2}, "mine.yaml: kind is 'views', expected 'corruptions'; leave it out"),
        ({"families": {}}, "families: "),
        ({"seed": 1}, "families: Field required"),
    ],
)
def test_a_suite_that_cannot_be(tmp_path: Path, content: dict[str, object], message: str) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=message) as caught:
        find_corruptions(str(tmp_path / "mine.yaml"))
    assert "\n" not in str(caught.value)


def test_an_unknown_suite() -> None:
    with pytest.raises(ConfigError, match="no corruptions 'fog': neither a YAML file nor one of ct, dermatology"):
        find_corruptions("fog")


MINE = Corruptions(suite="mine", families={"gaussian_noise": (0.02, 0.1, 0.3, 0.6, 1.0), "jpeg": (90, 50, 30, 15, 7)},
                   severities=(1, 3, 5), side=None)  # fmt: skip


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 images of two hues from 36 patients with captions; store `s` with MINE of each, `plain` without; a suite."""
    root = tmp_path_factory.mktemp("corruptions")
    (root / "images").mkdir()
    rows = []
    for i in range(72):
        rng = np.random.default_rng(i)
        shade = np.array([150, 90, 90] if i % 2 else [90, 90, 150]) + rng.normal(0, 25, (40, 40, 3))
        Image.fromarray(shade.clip(0, 255).astype(np.uint8)).save(root / f"images/{i}.png")
        rows.append(
            [f"k{i}", f"images/{i}.png", f"finding {i}", "ab"[i % 2], "train" if i < 24 else "test", f"p{i // 2}"]
        )
    with (root / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "image", "caption", "label", "split", "patient"], *rows])
    (root / "images/30.png").write_bytes(b"no image")
    teachers = load({"one": write_tiny_teacher(root / "one", seed=1)}, "one") | {"seer": Seer()}
    for name in ("s", "plain"):
        create_indexed_store(open_corpus(str(root / "pairs.csv")), root / name)
        if name == "s":
            append_pictures(Store.open(root / name), MINE, lambda line: None)
        run(root / "pairs.csv", root / name, teachers)
    dataset = {"dataset": "hues", "label": "label", "group": "patient", "tasks": ["linear_probe"],
               "rows": {"train": {"split": "train"}, "test": {"split": "test"}}}  # fmt: skip
    paired = {"dataset": "pairs", "group": "patient", "rows": {"test": {}}, "tasks": ["retrieval"]}
    suite = {"suite": "shaken", "store": "s", "bootstrap": {"n": 200}, "datasets": [dataset, paired],
             "settings": {"linear_probe": {"c_steps": 5}}}  # fmt: skip
    (root / "suite.yaml").write_text(yaml.safe_dump(suite | {"models": ["one"]}))
    (root / "both.yaml").write_text(yaml.safe_dump(suite | {"models": ["one", "seer"], "datasets": [dataset]}))
    (root / "bare.yaml").write_text(yaml.safe_dump(suite | {"store": "plain"}))
    return root


def test_pictures_are_found_by_image_and_number(scene: Path) -> None:
    store = FeatureStore.open(scene / "s")
    found = corrupted_rows(store, np.array([5, 9, 71]))
    assert found is not None
    recipe, rows = found
    assert recipe == MINE
    assert rows.T.tolist() == [[256 + 6 * row + i for i in range(6)] for row in (5, 9, 71)]
    assert corrupted_rows(FeatureStore.open(scene / "plain"), np.array([5])) is None


def test_drops_are_those_of_the_task_on_the_moved_rows(scene: Path) -> None:
    (report,) = measure_corruptions(load_suite(scene / "both.yaml"))
    assert (report.models, report.samples) == (("one", "seer"), 48)
    of = {(one.model, one.task, one.family, one.severity): one for one in report.drops}
    assert len(of) == 2 * 2 * (2 * 3 + 1)
    store = FeatureStore.open(scene / "s")
    clean = store.image("seer")[24:72].astype(np.float32)
    there = np.array([row != 30 for row in range(24, 72)])
    suite = load_suite(scene / "both.yaml")
    data, task = load_dataset(suite.datasets[0], store), TASKS["linear_probe"]
    scoring, variant = task.scoring(data.spec), task.variants(data.spec)[0]

    def probed(rows: np.ndarray) -> float:
        """The task's own prediction of a test split whose features lie in these rows."""
        test = data.split("test")
        moved = Samples("test", test.table.set_column(test.table.column_names.index("row"), "row", pa.array(rows)))
        asked = dataclasses.replace(data, splits=data.splits | {"test": moved})
        found = task.predict(variant, asked, Features(store, "seer"))
        found = found.take(found.available)
        return float(scoring.metrics[scoring.primary](found, np.ones((1, len(found))))[0])

    for number, (family, severity) in enumerate(MINE.conditions):
        rows = 256 + 6 * np.arange(24, 72) + number
        moved = store.image("seer")[rows].astype(np.float32)
        cosine = (clean * moved).sum(1) / np.linalg.norm(clean, axis=1) / np.linalg.norm(moved, axis=1)
        one = of["seer", "features", family, severity]
        assert one.value == pytest.approx(cosine[there].mean(), abs=1e-6)
        assert one.low < one.value < one.high <= 1
        assert one.drop.n == 47
        assert one.drop.value == pytest.approx(one.value - 1, abs=1e-6)
        probe = of["seer", "linear_probe", family, severity]
        assert probe.drop.value == pytest.approx(probe.value - probe.clean, abs=1e-12)
        expected = probed(rows)
        # Trained once for all blocks: sums of another order change the last digits.
        assert probe.value == pytest.approx(expected, abs=1e-9)
    assert of["seer", "features", "gaussian_noise", 5].value < of["seer", "features", "gaussian_noise", 1].value
    means = [of["seer", "linear_probe", *condition].value for condition in MINE.conditions]
    assert of["seer", "linear_probe", "all", 0].value == pytest.approx(np.mean(means))


def test_a_gallery_holds_one_condition_at_a_time_and_pictures_are_no_samples(scene: Path) -> None:
    (report,) = measure_corruptions(load_suite(scene / "suite.yaml"), "pairs")
    assert report.samples == 72
    tasks = {one.task for one in report.drops}
    assert tasks == {"features", "retrieval i2t", "retrieval t2i"}
    assert {one.drop.n for one in report.drops} == {71}


def mixed_suite(folder: Path, n: int = 24) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    """Images of which every third one is gray, without `saturate`; none has `scanner`. Returns the suite, and features
    of texts, images and pictures."""
    dim, rng = 8, np.random.default_rng(0)
    color = np.arange(n) % 3 != 0
    recipe = Corruptions(
        suite="mine", severities=(1,), families={"jpeg": (9,) * 5, "saturate": (0.1,) * 5, "scanner": (0.1,) * 5}
    )
    rows = [
        {"row": i, "key": f"k{i}", "caption": f"c{i}", "uri": f"{i}.png", "status": "ok", "image_sha256": f"{i}"}
        for i in range(n)
    ]
    pictures = [
        {"row": 256 + 3 * i + j, "key": f"k{i}#{j}", "status": "ok", "image_rows": [i], "view_number": j + 1}
        for i in range(n)
        for j in range(3)
    ]
    own = CorpusRecord(kind="test", location="here", root=str(folder), rows=n, digest="d")
    made = own.model_copy(
        update={
            "kind": "corruptions",
            "rows": 3 * n,
            "towers": ("image",),
            "recipe": {"corpus": 0, **recipe.model_dump()},
        }
    )
    index, further = (pa.Table.from_pylist(table, schema=sample_schema(())) for table in (rows, pictures))
    store = create_store(folder / "s", own, index, further=[(made, further)])
    text = rng.normal(size=(n, dim)).astype(np.float16)
    image = text + rng.normal(size=(n, dim)).astype(np.float16)
    moved = image[:, None] + rng.normal(size=(n, 3, dim)).astype(np.float16)
    card = make_card("alpha", dim)
    add_teacher(store, card)
    valid = np.stack([np.ones(n), color, np.zeros(n)], axis=1).astype(np.uint8).ravel()
    for shard, features in enumerate(
        (ShardFeatures(image, text, np.full(n, 3, np.uint8)), ShardFeatures(moved.reshape(-1, dim), None, valid))
    ):
        write_shard(store, card, shard, features, read_part(store.root, shard)[1])
    dataset = {"dataset": "mixed", "rows": {"test": {}}, "tasks": ["retrieval"]}
    suite = {"suite": "mixed", "store": "s", "bootstrap": {"n": 100}, "datasets": [dataset]}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder / "suite.yaml", text, image, moved


def test_a_family_that_images_cannot_have(tmp_path: Path) -> None:
    suite, text, image, moved = mixed_suite(tmp_path)
    n, color = len(image), np.arange(len(image)) % 3 != 0
    (report,) = measure_corruptions(load_suite(suite))
    assert report.notes == (
        "saturate: 8 of 24 images have no such picture", "scanner: 24 of 24 images have no such picture; left out",
        "rows `all` are of the 16 images that have a picture of every family in them",
    )  # fmt: skip

    def directions(values: np.ndarray) -> np.ndarray:
        wide = values.astype(np.float64)
        return wide / np.linalg.norm(wide, axis=-1, keepdims=True)

    def recalled(images: np.ndarray, among: np.ndarray) -> float:
        products = directions(images[among]) @ directions(text[among]).T
        return float((products.argmax(1) == np.arange(len(products))).mean())

    whole, cosine = np.ones(n, dtype=bool), (directions(image)[:, None] * directions(moved)).sum(-1)
    expected = {
        ("features", "jpeg"): (24, 1.0, cosine[:, 0].mean()),
        ("features", "saturate"): (16, 1.0, cosine[color, 1].mean()),
        ("features", "all"): (16, 1.0, cosine[color, :2].mean()),
        ("retrieval i2t", "jpeg"): (24, recalled(image, whole), recalled(moved[:, 0], whole)),
        # Both galleries are of the images in color: a smaller one is easier.
        ("retrieval i2t", "saturate"): (16, recalled(image, color), recalled(moved[:, 1], color)),
        ("retrieval i2t", "all"): (
            16, recalled(image, color), (recalled(moved[:, 0], color) + recalled(moved[:, 1], color)) / 2,
        ),
    }  # fmt: skip
    found = {(one.task, one.family): (one.drop.n, one.clean, one.value) for one in report.drops}
    for (task, family), row in expected.items():
        assert found[task, family] == pytest.approx(row, abs=1e-6)
    assert {family for _, family in found} == {"jpeg", "saturate", "all"}


def test_a_family_that_images_cannot_have_is_not_shown(tmp_path: Path) -> None:
    (report,) = measure_corruptions(load_suite(mixed_suite(tmp_path)[0]))
    _, heads, lines = next(iter(report.tables()))
    assert heads == ["model", "family", "n", "1", "mean"]
    assert [line[:3] for line in lines] == [
        ["alpha", "jpeg", "24"],
        ["alpha", "saturate", "16"],
        ["alpha", "all", "16"],
    ]
    assert write_corruptions(tmp_path, report).read_text().count("<svg") == 3
    lacking = tuple(dataclasses.replace(one, model="beta") for one in report.drops if one.family != "jpeg")
    both = dataclasses.replace(report, models=("alpha", "beta"), drops=report.drops + lacking)
    (legend,) = corruption_figure(both, "features").legends
    assert [text.get_text() for text in legend.get_texts()] == ["alpha", "beta"]


def test_command_writes_a_page_and_a_file(scene: Path) -> None:
    found = CliRunner().invoke(evaluate, ["corruptions", str(scene / "both.yaml"), "--out", str(scene / "out")])
    assert found.exit_code == 0, found.output
    assert "hues: corruptions mine of 48 test images" in found.output
    content = json.loads((scene / "out/corruptions/hues.json").read_text())
    assert (content["schema"], content["recipe"]["suite"], len(content["drops"])) == ("mmkd.corruptions", "mine", 28)
    page = (scene / "out/corruptions/hues.html").read_text()
    assert page.count("<svg") == 2
    assert not re.search(r"(src|href)=[\"']?(http|//)", page)


@pytest.mark.parametrize(
    ("suite", "dataset", "message"),
    [
        (
            "bare.yaml",
            None,
            "hues: .*plain has no corrupted test images; pairs: .*extract them with `mmkd extract --corrupt`",
        ),
        ("suite.yaml", "other", "no data set 'other'; the suite has hues, pairs"),
    ],
)
def test_bad_input_is_one_line(scene: Path, suite: str, dataset: str | None, message: str) -> None:
    with pytest.raises(MmkdError, match=message) as caught:
        measure_corruptions(load_suite(scene / suite), dataset)
    assert "\n" not in str(caught.value)


def test_another_suite_in_the_same_store_is_refused(scene: Path) -> None:
    with pytest.raises(UserError, match="has corruptions with "):
        append_pictures(Store.open(scene / "s"), find_corruptions("ct"), lambda line: None)


def test_an_equal_recipe_of_another_spelling_is_there_already(scene: Path) -> None:
    before, strengths = Store.open(scene / "s"), (0.02, 0.1, 0.3, 0.6, 1)
    same = MINE.model_copy(update={"families": MINE.families | {"gaussian_noise": strengths}})
    said: list[str] = []
    assert append_pictures(before, same, said.append).record == before.record
    assert not said


def test_all_severities_are_five() -> None:
    assert {len(strengths) for name in SHIPPED for strengths in find_corruptions(name).families.values()} == {5}
    assert SEVERITIES == (1, 2, 3, 4, 5)
