"""The demo's corpus and specialists: true splits, same bytes every time, folders that open_clip loads as they are."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import math
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_sources import SMALL, pytestmark  # noqa: F401

from mmkd.base.errors import UserError
from mmkd.demo.corpus import COLUMNS, CROP_SIZE, VAGUE, as_found, build_corpus, choose_crops, pixels, read_frames
from mmkd.demo.sources import SOURCES, Box, File, Source

PARTS = ("private", "train", "eval")
MARGIN = 4  # pixels or frames that lie between a train region and a test region


def by_slug(slug: str) -> Source:
    return next(source for source in SOURCES if source.slug == slug)


def tables(corpus: Path) -> list[list[dict[str, str]]]:
    """Rows of the private, the training and the evaluation table."""
    return [list(csv.DictReader((corpus / name / "captions.csv").open(newline=""))) for name in PARTS]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def apart(one: Box, other: Box) -> bool:
    """Whether two boxes have at least MARGIN pixels between them."""
    horizontal = max(one[0], other[0]) - min(one[2], other[2])
    vertical = max(one[1], other[1]) - min(one[3], other[3])
    return max(horizontal, vertical) >= MARGIN


def test_nine_domains_of_at_least_two_classes() -> None:
    classes = Counter(source.domain for source in SOURCES)
    assert len(classes) == 9
    assert min(classes.values()) >= 2
    assert len({source.slug for source in SOURCES}) == len(SOURCES)


def test_every_class_has_its_own_words_and_prompts_are_held_out() -> None:
    captions = [text for source in SOURCES for text in source.captions]
    prompts = [text for source in SOURCES for text in source.prompts]
    assert min(len(source.captions) for source in SOURCES) >= 6
    assert all(len(source.prompts) == 3 for source in SOURCES)
    texts = [text.casefold() for text in captions + prompts]
    assert len(set(texts)) == len(texts)
    assert all(text == text.strip() and len(text.split()) >= 3 for text in texts)


def test_train_and_test_regions_share_no_pixel_even_across_classes_of_one_picture() -> None:
    for one, other in itertools.product(SOURCES, SOURCES):
        if one.file != other.file or one.axis != other.axis:
            continue
        frames = [n for frames in one.train_frames for n in frames], [n for frames in other.test_frames for n in frames]
        frames_apart = min(abs(a - b) for a in frames[0] for b in frames[1]) > MARGIN
        boxes_apart = all(apart(a, b) for a in one.train for b in other.test)
        assert frames_apart or boxes_apart, f"{one.slug} (train) meets {other.slug} (test)"


def test_regions_lie_inside_their_pictures_and_hold_a_window() -> None:
    for source in SOURCES:
        stack = read_frames(source.file, source.level, source.axis)
        assert stack.dtype == np.uint8
        for left, top, right, bottom in source.train + source.test:
            assert 0 <= left < right <= stack.shape[2], source.slug
            assert 0 <= top < bottom <= stack.shape[1], source.slug
            assert min(right - left, bottom - top) >= source.window[0], source.slug
        for frames in source.train_frames + source.test_frames:
            assert 0 <= frames[0] <= frames[-1] < len(stack), source.slug


def test_ct_values_are_hounsfield_units_between_black_and_white() -> None:
    import pydicom

    source = by_slug("brain-ct")
    assert source.level == (0, 80)
    data = pydicom.dcmread(source.file.locate())
    stored = np.frombuffer(data.PixelData, dtype="<i2").reshape(data.Rows, data.Columns)
    units = stored * float(data.RescaleSlope) + float(data.RescaleIntercept)
    expected = np.rint(np.clip(units / 80, 0, 1) * 255)
    np.testing.assert_array_equal(read_frames(source.file, source.level, None)[0], expected)


def test_bones_are_white_in_a_radiograph_stored_inverted() -> None:
    source = by_slug("chest-xray")
    picture = read_frames(source.file, None, None)[0]
    spine, lung = picture[900:1000, 880:960].mean(), picture[380:460, 1480:1560].mean()
    assert spine > lung + 50


def test_axial_slices_show_the_front_of_the_head_at_the_top() -> None:
    import nibabel

    source = by_slug("brain-mri-axial")
    volume = nibabel.load(source.file.locate())
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    slice_90 = np.asarray(volume.dataobj)[:, :, 90]
    np.testing.assert_array_equal(read_frames(source.file, None, 2)[90], slice_90[:, ::-1].T)


def test_crops_lie_in_their_boxes_and_are_all_different() -> None:
    for source in (by_slug("colon-gland-ihc"), by_slug("heart-us")):
        regions = {"train": (source.train, source.train_frames), "test": (source.test, source.test_frames)}
        for split, (boxes, ranges) in regions.items():
            crops = choose_crops(source, split, 40)
            assert len(set(crops)) == 40
            for crop in crops:
                left, top, right, bottom = crop.box
                assert any(b[0] <= left and b[1] <= top and right <= b[2] and bottom <= b[3] for b in boxes)
                assert any(crop.frame in frames for frames in ranges)
                assert pixels(crop).shape[:2] == (CROP_SIZE, CROP_SIZE)
    used = Counter(crop.frame for crop in choose_crops(by_slug("heart-us"), "test", 16))
    assert used == dict.fromkeys(range(22, 30), 2)  # every held-out frame as often


def test_background_gives_no_crops_but_one_line() -> None:
    corner = replace(by_slug("abdomen-ct"), train=((0, 420, 512, 512),), window=(60, 80))  # air below the patient
    with pytest.raises(UserError, match=r"^abdomen-ct: found 0 train crops of 3; ask for fewer crops a class$"):
        choose_crops(corner, "train", 3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    build_corpus(folder, train_per_class=14, test_per_class=7)
    return folder


def test_tables_list_every_image_and_every_prompt(corpus: Path) -> None:
    private, train, evaluation = tables(corpus)
    assert tuple(private[0]) == tuple(train[0]) == tuple(evaluation[0]) == COLUMNS
    counts = Counter((row["class"], row["split"]) for row in private + train + evaluation)
    wanted = {"private": 14, "train": 14, "test": 7, "prompt": 4}
    assert counts == {(source.slug, split): count for source in SOURCES for split, count in wanted.items()}
    assert all(row["caption"] and row["modality"] for row in train + evaluation)
    assert {row["class"]: row["domain"] for row in train + evaluation} == {s.slug: s.domain for s in SOURCES}
    assert len({row["key"] for row in private + train + evaluation}) == len(private + train + evaluation)
    for name, rows in zip(PARTS, (private, train, evaluation), strict=True):
        listed = {row["image"] for row in rows if row["split"] != "prompt"}
        assert listed == {f"images/{path.name}" for path in (corpus / name / "images").iterdir()}
        for image in sorted(listed)[::9]:
            with Image.open(corpus / name / image) as picture:
                assert picture.size == (CROP_SIZE, CROP_SIZE)


def test_prompt_rows_have_no_image(corpus: Path) -> None:
    rows = [row for row in tables(corpus)[2] if row["split"] == "prompt"]
    texts = {source.slug: (*source.prompts, source.name) for source in SOURCES}
    expected = [(f"prompt-{slug}-{i}", "", text, slug) for slug, said in texts.items() for i, text in enumerate(said)]
    assert [(row["key"], row["image"], row["caption"], row["class"]) for row in rows] == expected


def test_no_evaluation_text_and_no_evaluation_image_was_trained_on(corpus: Path) -> None:
    private, train, evaluation = tables(corpus)
    assert not {row["caption"] for row in private + train} & {row["caption"] for row in evaluation}
    images = [set(digests(corpus / name / "images").values()) for name in PARTS]
    assert not images[0] & images[1] | images[0] & images[2] | images[1] & images[2]


def test_training_captions_are_right_vague_or_wrong_in_the_stated_shares(corpus: Path) -> None:
    private, train, _ = tables(corpus)
    assert {row["fits"] for row in private} == {"right"}
    fits = Counter(row["fits"] for row in train)
    assert fits["wrong"] / len(train) == pytest.approx(0.4, abs=0.08)
    assert fits["vague"] / len(train) == pytest.approx(0.3, abs=0.08)
    words = {source.slug: source.captions for source in SOURCES}
    for row in train:
        of_its_class = any(row["caption"].startswith(text) for text in words[row["class"]])
        assert of_its_class == (row["fits"] == "right"), row["key"]
        assert (row["caption"] in VAGUE) == (row["fits"] == "vague"), row["key"]


def test_clean_captions_when_no_share_is_to_be_vague_or_wrong() -> None:
    rows = [{"class": name, "caption": f"a {name}", "fits": "right"} for name in "aabb"]
    assert as_found(rows, 0, vague=0.0, wrong=0.0) == rows
    assert [row["caption"] for row in as_found(rows, 0, vague=0.0, wrong=1.0)] == ["a b", "a b", "a a", "a a"]
    assert {row["caption"] for row in as_found(rows, 0, vague=1.0, wrong=0.0)} <= set(VAGUE)


def test_same_seed_same_bytes_whatever_else_is_cut(corpus: Path, tmp_path: Path) -> None:
    again = build_corpus(tmp_path / "again", train_per_class=14, test_per_class=7, sources=SMALL)
    assert again.classes == tuple(source.slug for source in SMALL)
    assert (again.train, again.test, again.prompts) == (14 * len(SMALL), 7 * len(SMALL), 4 * len(SMALL))
    whole = digests(corpus)
    part = {name: digest for name, digest in digests(tmp_path / "again").items() if name.endswith(".png")}
    assert len(part) == 35 * len(SMALL)
    assert part.items() <= whole.items()
    build_corpus(tmp_path / "other", seed=1, train_per_class=14, test_per_class=7, sources=SMALL)
    other = digests(tmp_path / "other")
    assert all(other[name] != digest for name, digest in part.items())


def test_missing_package_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    gone = replace(SMALL[0], file=File("some-pictures", "not_installed_anywhere/picture.png", "MIT"))
    line = r"^the demo needs package some-pictures, which is not installed; run: pip install .*\[demo\]'"
    with pytest.raises(UserError, match=line):
        build_corpus(tmp_path / "out", sources=(SMALL[1], gone))
    assert not (tmp_path / "out").exists()


def test_package_without_the_picture_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"^package scikit-image has no data/no\.png, expected /.*; run: pip install .*$"
    ):
        File("scikit-image", "skimage/data/no.png", "BSD-3-Clause").locate()


def test_contrastive_loss_is_clip_loss_when_every_pair_has_its_own_class() -> None:
    import torch

    from mmkd.demo.specialists import contrastive_loss

    rng = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 5, generator=rng), dim=1) for _ in range(2))
    scale = torch.tensor(7.0)
    cosines = (images.double() @ texts.double().T).numpy() * 7
    rows = np.log(np.exp(cosines).sum(1)) - np.diag(cosines)
    columns = np.log(np.exp(cosines).sum(0)) - np.diag(cosines)
    expected = (rows.mean() + columns.mean()) / 2
    assert float(contrastive_loss(images, texts, torch.arange(6), scale)) == pytest.approx(expected, rel=1e-5)
    # Two classes of two, perfectly told apart and equal within: the best softmax gives each positive one half.
    basis = torch.eye(2)[[0, 0, 1, 1]]
    best = contrastive_loss(basis, basis, torch.tensor([0, 0, 1, 1]), torch.tensor(100.0))
    assert float(best) == pytest.approx(math.log(2), abs=1e-6)


def test_alignment_loss_is_one_minus_cosine() -> None:
    import torch

    from mmkd.demo.specialists import alignment_loss

    texts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    images = texts[[0, 0, 0]]
    assert float(alignment_loss(images, texts)) == pytest.approx((0 + 1 + 2) / 3)


def test_unknown_domain_is_one_line(corpus: Path, tmp_path: Path) -> None:
    from mmkd.demo.specialists import train_specialists

    with pytest.raises(
        UserError, match=r"captions\.csv has no domain 'dentistry'; expected one of: histology, .*nuclear$"
    ):
        train_specialists(corpus / "train" / "captions.csv", tmp_path, domains=("dentistry",))


def test_heads_are_the_same_bits_whatever_the_number_of_threads() -> None:
    import torch

    from mmkd.demo.specialists import Features, train_heads

    rng = torch.Generator().manual_seed(0)
    features = Features(
        torch.randn(300, 1280, generator=rng), torch.randn(300, 384, generator=rng), torch.arange(300) % 3
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(train_heads(features, steps=5))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].image, other.image) and torch.equal(found[0].text, other.text) for other in found)


@pytest.mark.slow
def test_specialists_load_in_open_clip_and_know_their_own_domain(corpus: Path, tmp_path: Path) -> None:
    import open_clip
    import torch

    from mmkd.demo import specialists as demo

    domains = ("fundus", "ultrasound")
    train, _, evaluation = tables(corpus)
    table = corpus / "private" / "captions.csv"
    folders = demo.train_specialists(table, tmp_path, domains=domains)
    assert [folder.name for folder in folders] == ["fundus-specialist", "ultrasound-specialist"]
    rows = [row for row in train if row["domain"] in domains]
    features = demo.tower_features(demo.load_towers(), rows, table.parent)
    own = torch.tensor([index for index, row in enumerate(rows) if row["domain"] == "fundus"])
    heads = demo.train_heads(features.take(own))

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{patched(folders[0], tmp_path / 'load')}")
    model.eval()
    tokenize = open_clip.get_tokenizer(f"local-dir:{folders[0]}")
    images = torch.stack([preprocess(Image.open(table.parent / row["image"])) for row in rows])
    with torch.inference_mode():
        image, text = model.encode_image(images), model.encode_text(tokenize([row["caption"] for row in rows]))
    torch.testing.assert_close(image, features.image @ heads.image.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text, features.text @ heads.text.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.logit_scale, heads.logit_scale)

    assert "optic disc: 14 crops, package scikit-image, CC0-1.0" in (folders[0] / "README.md").read_text()
    assert (folders[0] / "open_clip_model.safetensors").stat().st_mode & 0o044  # others may read it too

    tests = [row for row in evaluation if row["split"] == "test" and row["domain"] in domains]
    prompts = [row for row in evaluation if row["split"] == "prompt"]
    images = torch.stack([preprocess(Image.open(corpus / "eval" / row["image"])) for row in tests])
    with torch.inference_mode():
        image = torch.nn.functional.normalize(model.encode_image(images), dim=1)
        text = torch.nn.functional.normalize(model.encode_text(tokenize([row["caption"] for row in prompts])), dim=1)
    per_class = text.reshape(len(SOURCES), 4, -1).mean(1)
    guesses = [SOURCES[index].slug for index in (image @ per_class.T).argmax(1).tolist()]
    right = np.array(guesses) == [row["class"] for row in tests]
    at_home = np.array([row["domain"] == "fundus" for row in tests])
    assert right[at_home].mean() > 0.5  # chance is 1/24
    assert right[~at_home].mean() < 0.2


def patched(folder: Path, copy: Path) -> Path:
    """The folder with its text tower named by a path, as open_clip wants it where there is no hub."""
    copy.mkdir()
    for path in folder.iterdir():
        os.link(path, copy / path.name)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_model_name"] = str(copy)
    (copy / "open_clip_config.json").unlink()
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    return copy
