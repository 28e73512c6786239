"""Encoders with one tower: features and pixels against timm and transformers called directly; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mmkd.base.errors import TeacherError, UserError
from mmkd.extract.teachers import describe_teacher, load_teacher
from mmkd.extract.teachers.convert import convert_teacher
from mmkd.extract.teachers.geometry import geometry_of, normalize, pixels_of
from mmkd.extract.teachers.loaded import LoadedTeacher
from tests import encoder_snapshots as snapshots
from tests.clip_snapshots import plip
from tests.conch_snapshot import conch
from tests.teacher_parts import CAPTIONS, Snapshot, pictures, sealed  # noqa: F401

pytestmark = pytest.mark.usefixtures("sealed")
CPU = torch.device("cpu")
IMAGES = snapshots.TIMM | snapshots.TOWERS


def load(encoder: snapshots.Encoder | Snapshot) -> LoadedTeacher:
    teacher = load_teacher(encoder.spec, describe_teacher(encoder.spec), CPU)
    assert isinstance(teacher, LoadedTeacher)
    return teacher


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 0.1, "a quiet reference would hide mistakes"
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.integration
@pytest.mark.parametrize("form", IMAGES)
def test_image_features_and_pixels_are_the_librarys(form: str, tmp_path: Path) -> None:
    encoder = IMAGES[form](tmp_path)
    teacher = load(encoder)
    assert teacher.card.towers == ("image",)
    assert (teacher.card.tokenizer_sha256, teacher.card.context_length) == ("", 0)
    geometry = geometry_of(teacher.card.image_preprocessing)
    pixels = torch.from_numpy(np.stack([pixels_of(picture, [geometry])[geometry] for picture in pictures()]))
    images = normalize(pixels, teacher.card.image_preprocessing)
    if form != "dinov3":  # whose processor resizes numbers that are not rounded to bytes
        assert encoder.transform is not None
        theirs = torch.stack([torch.as_tensor(encoder.transform(picture)) for picture in pictures()])
        torch.testing.assert_close(images, theirs, rtol=0, atol=2e-6)
    with torch.no_grad():
        same(teacher.encode_images(pixels), encoder.forward(images))
    with pytest.raises(UserError, match=r"teacher mine has no text tower \(its card lists image only\)"):
        teacher.tokenize(["a"])


@pytest.mark.integration
@pytest.mark.parametrize("form", snapshots.TEXTS)
def test_text_features_are_the_librarys(form: str, tmp_path: Path) -> None:
    encoder = snapshots.TEXTS[form](tmp_path)
    teacher = load(encoder)
    assert (teacher.card.towers, teacher.card.preprocessing) == (("text",), None)
    tokens, lengths = teacher.tokenize([*CAPTIONS, ""])
    assert tokens.shape == (5, 48)
    assert min(lengths) == 2
    with torch.no_grad():
        expected = encoder.forward(tokens)
    same(teacher.encode_texts(tokens), expected)
    same(teacher.encode_texts(tokens[:2, :16]), expected[:2])
    with pytest.raises(UserError, match=r"teacher mine has no image tower \(its card lists text only\)"):
        teacher.encode_images(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.integration
def test_conch_is_its_authors(tmp_path: Path) -> None:
    snapshot = conch(tmp_path)
    teacher = load(snapshot)
    look = teacher.card.image_preprocessing
    assert (look.image_size, teacher.card.context_length, teacher.card.dim) == ((448, 448), 127, 512)
    pixels = torch.randint(0, 256, (2, 3, 448, 448), dtype=torch.uint8)
    tokens, lengths = teacher.tokenize([*CAPTIONS, "", "a" * 200])
    assert (tokens.shape, lengths[-2:]) == ((6, 127), [2, 202])
    with torch.no_grad():
        same(teacher.encode_images(pixels), snapshot.image(normalize(pixels, look)))
        same(teacher.encode_texts(tokens), snapshot.text(tokens))
    assert teacher.text_lengths == (127,), "the class token's place follows the padding"
    for name in ("tokenizer.json", "tokenizer_config.json"):  # which the hub does not have
        (tmp_path / name).unlink()
    with pytest.raises(TeacherError, match="tokenizer"):
        describe_teacher(snapshot.spec)
    alone = snapshot.spec.model_copy(update={"towers": ("image",)})
    assert describe_teacher(alone).towers == ("image",)


def test_one_tower_of_two(tmp_path: Path) -> None:
    spec = plip(tmp_path).spec
    both = load_teacher(spec, describe_teacher(spec), CPU)
    alone = spec.model_copy(update={"towers": ("image",)})
    teacher = load_teacher(alone, describe_teacher(alone), CPU)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(teacher.encode_images(pixels), both.encode_images(pixels))
    assert teacher.card.digest != both.card.digest
    encoder = snapshots.TOWERS["dinov2"](_folder(tmp_path / "d"))
    with pytest.raises(TeacherError, match="towers asks for the text tower, which the files do not have; leave it out"):
        describe_teacher(encoder.spec.model_copy(update={"towers": ("text",)}))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("form", ["uni", "vit_mae", "bert of pretraining"])
def test_a_converted_encoder_is_the_same(form: str, tmp_path: Path) -> None:
    encoder = (IMAGES | snapshots.TEXTS)[form](_folder(tmp_path / "published"))
    assert convert_teacher(encoder.spec, tmp_path / "new").digest == describe_teacher(encoder.spec).digest


def _changed(form: str, name: str, **changes: object) -> Callable[[Path], snapshots.Encoder]:
    def make(folder: Path) -> snapshots.Encoder:
        encoder = (IMAGES | snapshots.TEXTS)[form](folder)
        content = json.loads((folder / name).read_text())
        (content.get("pretrained_cfg") or content).update(changes)
        (folder / name).write_text(json.dumps(content))
        return encoder

    return make


def _asked(form: str, **changes: object) -> Callable[[Path], snapshots.Encoder]:
    def make(folder: Path) -> snapshots.Encoder:
        encoder = (IMAGES | snapshots.TEXTS)[form](folder)
        options = encoder.spec.options | changes
        spec = encoder.spec.model_copy(update={"options": {k: v for k, v in options.items() if v is not None}})
        return snapshots.Encoder(spec, encoder.forward)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_changed("class token", "config.json", crop_mode="border"), "crop_mode border, crop_pct 0.95"),
        (_changed("class token", "config.json", crop_mode="squash"), "crop_mode squash, crop_pct 0.95"),
        (_changed("class token", "config.json", interpolation="lanczos"), "interpolation lanczos, which mmkd does not"),
        (_changed("class token", "config.json", input_size=[1, 160, 160]), r"input_size \[1, 160, 160\], crop_mode"),
        (_asked("class token", architecture="vit_bsae_patch16_224"), "has no architecture 'vit_bsae_patch16_224'; did"),
        (_asked("class token", pooling="first"), "option 'pooling': Input should be 'model', 'class', 'mean' or"),
        (_asked("class token", model_args={"mlp_layer": "os"}), "mlp_layer is 'os', no class of timm.layers such as"),
        (_asked("class token", model_args={"depht": 3}), "timm cannot build test_vit with"),
        (_asked("attention pool", pooling="class"), "'class', but this model has no class token, no tokens at all, or"),
        (_asked("convolutions", pooling="mean"), "options.pooling is 'mean', but this model has no class token, no"),
        (
            _asked("class token", model_args={"global_pool": "avg"}, pooling="mean"),
            "after its own pooling; leave it out for the",
        ),
        (_asked("virchow2", pooling=None), r"features of shape \(105, 64\), its configuration says 64; .* pooling"),
        (_asked("class token", model_args={"depth": 3}), "does not fit this architecture: 36 unexpected"),
        (_asked("vit", pooling=None), "its authors' pooling is not in its files; write options.pooling of a vit in a"),
        (_asked("vit_mae", pooling="model"), "options.pooling of a vit_mae in a YAML card: class, mean, class_mean$"),
        (_asked("bert, mean", pooling=None), "write options.pooling of a bert in a YAML card: class, mean, class_mean"),
        (_asked("siglip", pooling="class"), "'class'; write options.pooling of a siglip_vision_model in a YAML card: "),
        (_asked("modernbert", pooling="model"), "options.pooling is 'model'; write options.pooling of a modernbert in"),
        (
            _changed("dinov2", "preprocessor_config.json", do_center_crop=False),
            "do_center_crop False, .*which mmkd does not do exactly",
        ),
        (_changed("dinov2", "preprocessor_config.json", size={"shortest_edge": 24}), "which mmkd does not do exactly"),
        (_changed("vit", "preprocessor_config.json", resample=1), "resample 1"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    make: Callable[[Path], snapshots.Encoder], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        load(make(tmp_path))
    assert "\n" not in str(caught.value)
