"""One corruption of a picture at a time: pure functions of a picture in mode `L` or `RGB`, a strength and a generator
of random numbers, which return one of the same mode and size.

The families and what their strengths mean are those of MedMNIST-C (Di Salvo, Doerrich and Ledig 2024, arXiv 2406.17536;
code francescodisalvo05/medmnistc-api at 8acfd27), most after ImageNet-C (Hendrycks and Dietterich 2019); `stain`,
`scanner` and `dose` are not in it. Gray pictures stay gray, with one noise where MedMNIST-C draws one for each of three
equal channels; values are rounded, not cut off; beyond the edge the last pixel goes on."""

import io
from collections.abc import Callable, Sequence
from math import ceil, cos, exp, isqrt, log, radians, sin
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from mmkd.base.arrays import Floats
from mmkd.base.images.source import ImageError

Rng = np.random.Generator
Effect = Callable[[Image.Image, Any, Rng], Image.Image]
HED: Final = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical density of hematoxylin, eosin and DAB in red, green and blue (Ruifrok and Johnston 2001)."""
CT_NOISE = 10 / 400
"""Noise of a full dose, a share of the gray values: 10 HU, usual for an abdomen, in its window of 400 HU. Ours."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _shares(image: Image.Image) -> Floats:
    return np.asarray(image, dtype=np.float64) / 255


def _picture(shares: Floats) -> Image.Image:
    return Image.fromarray(np.rint(shares.clip(0, 1) * 255).astype(np.uint8))


def _spread(values: Floats, taps: Sequence[tuple[int, int, float]]) -> Floats:
    """Weighted mean of the values (H, W, ...) that lie (down, right) of each place."""
    reach = max(max(abs(down), abs(right)) for down, right, _ in taps)
    padded = np.pad(values, ((reach, reach), (reach, reach), *[(0, 0)] * (values.ndim - 2)), mode="edge")
    height, width = values.shape[:2]
    total = sum(
        weight * padded[reach + down : reach + down + height, reach + right : reach + right + width]
        for down, right, weight in taps
    )
    return np.asarray(total / sum(weight for *_, weight in taps))


def _bell(values: Floats, kernel: int, sigma: float) -> Floats:
    weights = [(step, exp(-(step**2) / (2 * sigma**2))) for step in range(-(kernel // 2), kernel // 2 + 1)]
    down = _spread(values, [(step, 0, weight) for step, weight in weights])
    return _spread(down, [(0, step, weight) for step, weight in weights])


def jpeg(image: Image.Image, quality: int, _: Rng) -> Image.Image:
    """Stored as JPEG of this quality."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).copy()


def pixelate(image: Image.Image, share: float, _: Rng) -> Image.Image:
    """Resized to a share of its sides, and back."""
    small = image.resize((max(1, int(image.width * share)), max(1, int(image.height * share))), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BOX)


def gaussian_noise(image: Image.Image, deviation: float, rng: Rng) -> Image.Image:
    """Noise with this standard deviation, 1 being white."""
    shares = _shares(image)
    return _picture(shares + deviation * rng.standard_normal(shares.shape))


def speckle_noise(image: Image.Image, deviation: float, rng: Rng) -> Image.Image:
    """Noise in proportion to the value."""
    shares = _shares(image)
    return _picture(shares * (1 + deviation * rng.standard_normal(shares.shape)))


def impulse_noise(image: Image.Image, share: float, rng: Rng) -> Image.Image:
    """A share of the values is black or white, half of it each."""
    shares = _shares(image)
    drawn = rng.random(shares.shape)
    return _picture(np.where(drawn < share, np.where(drawn < share / 2, 0.0, 1.0), shares))


def shot_noise(image: Image.Image, photons: float, rng: Rng) -> Image.Image:
    """Counts of a white pixel with this mean (Poisson)."""
    return _picture(rng.poisson(_shares(image) * photons) / photons)


def gaussian_blur(image: Image.Image, kernel: int, _: Rng) -> Image.Image:
    """A kernel of this size, with the standard deviation that torchvision gives it."""
    return _picture(_bell(_shares(image), kernel, 0.3 * ((kernel - 1) / 2 - 1) + 0.8))


def defocus_blur(image: Image.Image, radius: float, _: Rng) -> Image.Image:
    """The mean within a circle. MedMNIST-C softens its edge by a kernel of 3 pixels, here it is hard."""
    reach = int(radius)
    widths = [(down, isqrt(int(radius**2 - down**2))) for down in range(-reach, reach + 1)]
    return _picture(_spread(_shares(image), [(d, r, 1.0) for d, width in widths for r in range(-width, width + 1)]))


def motion_blur(image: Image.Image, strength: tuple[int, float], rng: Rng) -> Image.Image:
    """Along a line at up to 45 degrees, radius and deviation: half a bell curve, as ImageMagick has it."""
    radius, sigma = strength
    angle = radians(rng.uniform(-45, 45))
    steps = range(2 * int(radius) + 1)
    line = [(ceil(i * sin(angle) - 0.5), ceil(i * cos(angle) - 0.5), exp(-(i**2) / (2 * sigma**2))) for i in steps]
    return _picture(_spread(_shares(image), line))


def zoom_blur(image: Image.Image, strength: tuple[float, float], _: Rng) -> Image.Image:
    """The mean of the picture and of itself, larger and larger up to a factor, in steps."""
    most, step = strength
    (width, height), zooms = image.size, np.arange(1, most, step).tolist()
    crops = [((1 - 1 / z) / 2 * width, (1 - 1 / z) / 2 * height) for z in zooms]
    larger = [
        image.resize(image.size, Image.Resampling.BILINEAR, (left, top, width - left, height - top))
        for left, top in crops
    ]
    return _picture(np.mean([_shares(one) for one in (image, *larger)], axis=0))


def brightness(image: Image.Image, factor: float, _: Rng) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def contrast(image: Image.Image, factor: float, _: Rng) -> Image.Image:
    """About the mean gray."""
    return ImageEnhance.Contrast(image).enhance(factor)


def gamma(image: Image.Image, power: float, _: Rng) -> Image.Image:
    """Values, 1 being white, to this power."""
    return image.point([round(255 * (value / 255) ** power) for value in range(256)] * len(image.mode))


def saturate(image: Image.Image, more: float, _: Rng) -> Image.Image:
    """Added to the saturation of HSV."""
    hue, saturation, value = _in_color(image, "saturate").convert("HSV").split()
    higher = saturation.point([min(255, round(old + 255 * more)) for old in range(256)])
    return Image.merge("HSV", (hue, higher, value)).convert("RGB")


def bubble(image: Image.Image, strength: tuple[int, int], rng: Rng) -> Image.Image:
    """White translucent circles, from 3 pixels up to a radius, from 7 up to a number of them."""
    most, number = strength
    mask = Image.new("L", image.size)
    for _ in range(int(rng.integers(7, number, endpoint=True))):
        radius = int(rng.integers(3, most, endpoint=True))
        x, y = (int(rng.integers(min(radius, side // 2), max(side - radius, side // 2) + 1)) for side in image.size)
        for reach, alpha in ((radius + 2, 130), (radius, 100)):
            ImageDraw.Draw(mask).ellipse((x - reach, y - reach, x + reach, y + reach), fill=alpha)
    return Image.composite(Image.new(image.mode, image.size, "white"), image, mask)


def black_corner(image: Image.Image, share: float, _: Rng) -> Image.Image:
    """Black outside a circle with this share of half the shorter side as radius: a dermatoscope."""
    (width, height), mask = image.size, Image.new("L", image.size)
    radius = int(min(width, height) // 2 * share)
    x, y = width // 2, height // 2
    ImageDraw.Draw(mask).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return Image.composite(image, Image.new(image.mode, image.size), mask)


def characters(image: Image.Image, strength: tuple[int, int], rng: Rng) -> Image.Image:
    """Up to a number of words of 3 letters up to a number, anywhere. MedMNIST-C has another font."""
    words, letters = strength
    written = image.copy()
    for _ in range(int(rng.integers(1, words, endpoint=True))):
        word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(3, letters, endpoint=True)))
        x, y = (int(rng.integers(max(1, side - 10))) for side in image.size)
        color = tuple(rng.integers(256, size=len(image.mode)).tolist())
        ImageDraw.Draw(written).text(
            (x, y), word, fill=color if len(color) > 1 else color[0], font=ImageFont.load_default()
        )
    return written


def stain(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Each stain's density times 1 - x to 1 + x plus -x to x (Tellez et al. 2018, IEEE Trans. Med. Imaging 37:2126, for
    hematoxylin, eosin and DAB after color deconvolution)."""
    axes = HED / np.linalg.norm(HED, axis=1, keepdims=True)
    density = -np.log10(np.maximum(_shares(_in_color(image, "stain")), 1 / 255))
    factors, shifts = 1 + strength * rng.uniform(-1, 1, 3), strength * rng.uniform(-1, 1, 3)
    return _picture(10 ** -((density @ np.linalg.inv(axes) * factors + shifts) @ axes))


def scanner(image: Image.Image, strength: float, rng: Rng) -> Image.Image:
    """Each color's gain and gamma, drawn between 1 - x and 1 + x: another light source and camera. Ours."""
    gains, powers = 1 + strength * rng.uniform(-1, 1, (2, 3))
    return _picture(gains * _shares(_in_color(image, "scanner")) ** powers)


def dose(image: Image.Image, share: float, rng: Rng) -> Image.Image:
    """CT at a share of the dose: noise's variance is inverse to the dose (quantum noise), so that `CT_NOISE` squared
    times (1 / share - 1) is added, correlated over 3 x 3 pixels (a soft kernel; ours) as reconstructed noise is."""
    shares = _shares(image)
    noise = _bell(rng.standard_normal(shares.shape[:2]), 3, 1 / (2 * log(2)) ** 0.5)  # weights 1, 2, 1: each tap halves
    noise *= CT_NOISE * (1 / share - 1) ** 0.5 * 8 / 3  # their squares add up to (3 / 8)^2
    return _picture(shares + (noise if image.mode == "L" else noise[..., None]))


def _in_color(image: Image.Image, name: str) -> Image.Image:
    if image.mode != "RGB":
        raise ImageError(f"{name} needs a picture in color")
    return image


EFFECTS: Final[MappingProxyType[str, Effect]] = MappingProxyType(
    {
        one.__name__: one
        for one in (
            jpeg, pixelate, gaussian_noise, speckle_noise, impulse_noise, shot_noise, gaussian_blur, defocus_blur,
            motion_blur, zoom_blur, brightness, contrast, gamma, saturate, bubble, black_corner, characters, stain,
            scanner, dose,
        )
    }
)  # fmt: skip
"""By name."""
RANGES: Final[MappingProxyType[str, tuple[tuple[type, float, float], ...]]] = MappingProxyType(
    {
        "jpeg": ((int, 1, 100),), "pixelate": ((float, 0.001, 1),), "gaussian_noise": ((float, 0, 10),),
        "speckle_noise": ((float, 0, 10),), "impulse_noise": ((float, 0, 1),), "shot_noise": ((float, 0.1, 1e9),),
        "gaussian_blur": ((int, 1, 999),), "defocus_blur": ((float, 0, 100),),
        "motion_blur": ((float, 0, 500), (float, 0.1, 500)), "zoom_blur": ((float, 1, 10), (float, 0.001, 1)),
        "brightness": ((float, 0, 100),), "contrast": ((float, 0, 100),), "gamma": ((float, 0.01, 100),),
        "saturate": ((float, 0, 1),), "bubble": ((int, 3, 1000), (int, 7, 1000)), "black_corner": ((float, 0, 2),),
        "characters": ((int, 1, 1000), (int, 3, 100)), "stain": ((float, 0, 1),), "scanner": ((float, 0, 1),),
        "dose": ((float, 0.001, 1),),
    }
)  # fmt: skip
"""Type, least and largest value of each number of a strength, by effect."""
