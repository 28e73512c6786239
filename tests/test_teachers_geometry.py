"""Pixels, bit by bit, against each teacher's reference implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from mmkd.base.errors import TeacherError
from mmkd.base.images import resampling
from mmkd.base.images.source import ImageError
from mmkd.extract.teachers.geometry import Geometry, geometry_of, normalize, pixels_of
from mmkd.store import Preprocessing

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
OPEN_CLIP = ("shortest", "longest", "squash")
MODES = (*OPEN_CLIP, "hf_shortest", "hf_squash", "pad_square")


def random_picture(rng: np.random.Generator, width: int, height: int, mode: str) -> Image.Image:
    """Noise, or a few hard edges, which go beyond the range of a byte when they are resized."""
    shape = (height, width, 3)[: 2 if mode == "L" else 3]
    values = rng.integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values if rng.random() < 0.5 else values // 128 * 255)


def reference(geometry: Geometry, picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels, uint8 (C, H, W), by the code of the teacher's authors or of the library that they used."""
    height, width = geometry.image_size
    filters = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    if geometry.resize_mode in OPEN_CLIP:
        config = PreprocessCfg(
            size=height if height == width else (height, width), resize_mode=geometry.resize_mode,
            interpolation=geometry.interpolation, fill_color=geometry.fill,
        )  # fmt: skip
        if geometry.resize:
            mode = InterpolationMode(geometry.interpolation)
            chain = (transforms.Resize(geometry.resize, mode), transforms.CenterCrop(height))
            return np.asarray(chain[1](chain[0](picture.convert("RGB")))).transpose(2, 0, 1)
        shown = picture
        for step in image_transform_v2(config, is_train=False).transforms[:-2]:
            shown = step(shown)
        return np.asarray(shown).transpose(2, 0, 1)
    if geometry.resize_mode == "pad_square":
        # MedCLIPFeatureExtractor: pad_img, then the resize of transformers 4.23.
        side = max(height, *picture.size)
        square = Image.new(geometry.color, (side, side), (geometry.fill,) * len(geometry.color))
        corner = int((side - picture.width) / 2), int((side - picture.height) / 2)
        square.paste(picture.convert(geometry.color), corner)
        values = np.asarray(square.resize((width, height), filters[geometry.interpolation]))
        return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    plain = {"do_rescale": False, "do_normalize": False, "resample": filters[geometry.interpolation]}
    processor = (
        CLIPImageProcessorPil(
            size={"shortest_edge": geometry.resize or min(height, width)},
            crop_size={"height": height, "width": width},
            **plain,
        )
        if geometry.resize_mode == "hf_shortest"
        else SiglipImageProcessorPil(size={"height": height, "width": width}, **plain)
    )
    return np.asarray(processor(picture.convert("RGB"), return_tensors="np")["pixel_values"][0])


def geometries(size: tuple[int, int], fill: int = 0) -> list[Geometry]:
    """All modes, interpolations and colors of one size."""
    return [
        Geometry(image_size=size, interpolation=interpolation, resize_mode=mode, fill=fill, color=color)
        for mode in MODES
        for interpolation in resampling.FILTERS
        for color in (("RGB", "L") if mode == "pad_square" else ("RGB",))
    ] + [
        Geometry(size, interpolation, mode, fill, "RGB", resize=size[0] + more)
        for mode in ("shortest", "hf_shortest")
        for interpolation in resampling.FILTERS
        for more in (1, 8)
        if size[0] == size[1]
    ]


def has_reference(geometry: Geometry, picture: Image.Image) -> bool:
    """Whether the reference can do it: Pillow refuses a side of no pixels, transformers takes one to four rows for
    channels; its targets are square here. What would fill the memory is refused by us."""
    thin = max(picture.size) / min(picture.size)
    if geometry.resize_mode.startswith("hf_"):
        return min(picture.size) > 4 and geometry.image_size[0] == geometry.image_size[1]
    return thin < (min(geometry.image_size) if geometry.resize_mode == "longest" else 1000)


def compare(picture: Image.Image, wanted: list[Geometry]) -> None:
    """All of them together, each with its reference."""
    wanted = [geometry for geometry in wanted if has_reference(geometry, picture)]
    found = pixels_of(picture, wanted)
    assert set(found) == set(wanted)
    for geometry in wanted:
        expected = reference(geometry, picture)
        assert found[geometry].dtype == np.uint8
        assert found[geometry].flags.c_contiguous
        assert np.array_equal(found[geometry], expected), (picture.size, picture.mode, geometry)


@settings(max_examples=120)
@given(
    st.integers(1, 250), st.integers(1, 250), st.sampled_from(["RGB", "L"]), st.integers(0, 255),
    st.sampled_from([(64, 64), (33, 33), (48, 80), (70, 21)]),
)  # fmt: skip
def test_every_mode_is_its_reference(width: int, height: int, mode: str, seed: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    some = rng.choice(np.array(geometries(size, fill=seed), dtype=object), 4, replace=False)
    compare(random_picture(rng, width, height, mode), list(some))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_pictures_in_every_mode() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10_000):
        width, height = (int(side) for side in np.exp(rng.uniform(0, np.log(3000), 2)))
        size = int(rng.choice([224, 64, 33])), int(rng.choice([224, 64, 33]))
        wanted = geometries(size if rng.random() < 0.3 else (size[0], size[0]), fill=int(rng.integers(256)))
        some = [wanted[place] for place in rng.choice(len(wanted), 4, replace=False)]
        # No more than 400,000 pixels, whatever the ratio of the sides.
        height = min(height, 400_000 // width)
        compare(random_picture(rng, width, height, str(rng.choice(["RGB", "L"]))), some)


def ours(preprocessing: Preprocessing, picture: Image.Image) -> torch.Tensor:
    geometry = geometry_of(preprocessing)
    return normalize(torch.from_numpy(pixels_of(picture, [geometry])[geometry])[None], preprocessing)[0]


@pytest.mark.parametrize("size", [(80, 80), (300, 200), (31, 64)])
def test_normalized_pixels_are_those_of_the_libraries(size: tuple[int, int]) -> None:
    picture = random_picture(np.random.default_rng(0), *size, "RGB")
    chain = image_transform_v2(PreprocessCfg(size=64), is_train=False)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    expected: dict[str, Callable[[Image.Image], torch.Tensor]] = {
        "shortest": chain,
        "hf_shortest": lambda picture: torch.from_numpy(clip(picture, return_tensors="np")["pixel_values"][0]),
    }
    for mode, transform in expected.items():
        found = ours(Preprocessing(image_size=(64, 64), mean=OPENAI_MEAN, std=OPENAI_STD, resize_mode=mode), picture)
        assert torch.equal(found, transform(picture))


def test_open_clip_and_transformers_crop_differently() -> None:
    # A margin of three pixels: torchvision rounds 1.5 to 2, transformers to 1.
    picture = random_picture(np.random.default_rng(1), 64, 67, "RGB")
    wanted = [Geometry((64, 64), "bicubic", mode, 0, "RGB") for mode in ("shortest", "hf_shortest")]
    open_clip, hf = pixels_of(picture, wanted).values()
    assert np.array_equal(open_clip[:, :-1], hf[:, 1:])
    assert not np.array_equal(open_clip, hf)


def test_geometries_of_one_size_share_one_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def counted(picture: Image.Image, *wanted: Any) -> NDArray[np.uint8]:
        asked.append(wanted)
        return resampling.resize(picture, *wanted)

    monkeypatch.setattr("mmkd.extract.teachers.geometry.resize", counted)
    wanted = [Geometry((64, 64), "bicubic", mode, 0, "RGB") for mode in ("shortest", "hf_shortest")]
    wanted += [Geometry((64, 64), "bilinear", "shortest", 0, "RGB"), Geometry((64, 64), "bicubic", "squash", 0, "RGB")]
    pixels_of(random_picture(np.random.default_rng(2), 128, 134, "RGB"), wanted)
    # Of 67 rows the margin is 1 by transformers and 2 by torchvision: both parts in one.
    assert asked == [
        ((64, 67), "bicubic", (0, 1, 64, 66)),
        ((64, 67), "bilinear", (0, 2, 64, 66)),
        ((64, 64), "bicubic", (0, 0, 64, 64)),
    ]


def test_a_side_that_would_vanish() -> None:
    geometry = Geometry((64, 64), "bicubic", "longest", 0, "RGB")
    with pytest.raises(ImageError, match="1 x 200 pixels are too thin: resized, a side would have none"):
        pixels_of(Image.new("RGB", (1, 200)), [geometry])


def test_teachers_that_differ_in_normalisation_share_pixels() -> None:
    one, other = (Preprocessing(image_size=(64, 64), mean=(m,) * 3, std=(0.5,) * 3) for m in (0.1, 0.2))
    assert geometry_of(one) == geometry_of(other)


def test_a_mode_that_does_not_exist() -> None:
    with pytest.raises(
        TeacherError, match=r"resize 9, image_size \(8, 8\), resize_mode 'squash': resize goes with a sq"
    ):
        geometry_of(Preprocessing(image_size=(8, 8), mean=(0.5,), std=(0.5,), resize_mode="squash", resize=9))
    with pytest.raises(TeacherError, match="'stretch' with 'bicubic' does not exist: resize_mode is one of shortest"):
        geometry_of(Preprocessing(image_size=(8, 8), mean=(0.5,), std=(0.5,), resize_mode="stretch"))
