"""Pixels, bit by bit, against each teacher's reference implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers.geometry import geometry_of, normalize, pixel_transform
from mmkd.store import Preprocessing

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
sides = st.integers(20, 150)
modes = st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"])


def picture(width: int, height: int, mode: str) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    whole = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
    return whole if mode == "RGBA" else whole.convert("RGB").convert(mode)


def ours(preprocessing: Preprocessing, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(pixel_transform(geometry_of(preprocessing))(image))[None]
    return normalize(pixels, preprocessing)[0]


@settings(max_examples=60)
@given(
    sides, sides, modes, st.sampled_from(["shortest", "longest", "squash"]), st.sampled_from(["bicubic", "bilinear"])
)
def test_open_clip(width: int, height: int, mode: str, resize_mode: str, interpolation: str) -> None:
    preprocessing = Preprocessing(
        image_size=(64, 64), mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode=resize_mode, interpolation=interpolation
    )
    reference = image_transform_v2(
        PreprocessCfg(size=64, resize_mode=resize_mode, interpolation=interpolation), is_train=False
    )
    image = picture(width, height, mode)
    assert torch.equal(ours(preprocessing, image), reference(image))


@settings(max_examples=60)
@given(sides, sides, modes.filter(lambda mode: mode != "RGBA"))
def test_transformers_clip(width: int, height: int, mode: str) -> None:
    preprocessing = Preprocessing(image_size=(64, 64), mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode="hf_shortest")
    reference = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    image = picture(width, height, mode)
    expected = np.asarray(reference(image, return_tensors="np")["pixel_values"][0])
    assert np.array_equal(ours(preprocessing, image).numpy(), expected)


def test_alpha_is_dropped_as_it_was_when_the_teachers_were_trained() -> None:
    # transformers 5 lays transparent pictures on white, the releases of PLIP's day did not.
    preprocessing = Preprocessing(image_size=(64, 64), mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode="hf_shortest")
    image = picture(90, 80, "RGBA")
    assert torch.equal(ours(preprocessing, image), ours(preprocessing, image.convert("RGB")))


def test_open_clip_and_transformers_crop_differently() -> None:
    # A margin of three pixels: torchvision rounds 1.5 to 2, transformers to 1.
    image = picture(64, 67, "RGB")
    open_clip, hf = (
        ours(Preprocessing(image_size=(64, 64), mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode=mode), image)
        for mode in ("shortest", "hf_shortest")
    )
    assert torch.equal(open_clip[:, :-1], hf[:, 1:])
    assert not torch.equal(open_clip, hf)


@settings(max_examples=30)
@given(sides, sides)
def test_transformers_siglip(width: int, height: int) -> None:
    preprocessing = Preprocessing(image_size=(48, 48), mean=(0.5,) * 3, std=(0.5,) * 3, resize_mode="hf_squash")
    reference = SiglipImageProcessorPil(size={"height": 48, "width": 48}, resample=3)
    image = picture(width, height, "RGB")
    expected = np.asarray(reference(image, return_tensors="np")["pixel_values"][0])
    assert np.array_equal(ours(preprocessing, image).numpy(), expected)


@settings(max_examples=40)
@given(sides, sides, modes)
def test_medclip(width: int, height: int, mode: str) -> None:
    mean, std = 0.5862785803043838, 0.27950088968644304
    preprocessing = Preprocessing(image_size=(64, 64), mean=(mean,), std=(std,), resize_mode="pad_square", color="L")
    image = picture(width, height, mode)
    # MedCLIPFeatureExtractor: pad_img, then resize and normalize of transformers 4.23.
    size = max(64, width, height)
    square = Image.new("L", (size, size), 0)
    square.paste(image.convert("L"), (int((size - width) / 2), int((size - height) / 2)))
    scaled = np.asarray(square.resize((64, 64), Image.Resampling.BICUBIC), dtype=np.float32) / np.float32(255)
    expected = (scaled - np.float32(mean)) / np.float32(std)
    assert np.array_equal(ours(preprocessing, image)[0].numpy(), expected)


def test_teachers_that_differ_in_normalisation_share_pixels() -> None:
    one, other = (Preprocessing(image_size=(64, 64), mean=(m,) * 3, std=(0.5,) * 3) for m in (0.1, 0.2))
    assert pixel_transform(geometry_of(one)) is pixel_transform(geometry_of(other))


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(TeacherError, match="'stretch' with 'bicubic' does not exist: resize_mode is one of shortest"):
        ours(Preprocessing(image_size=(8, 8), mean=(0.5,), std=(0.5,), resize_mode="stretch"), picture(9, 9, "RGB"))
