"""Whatever one image raises is its own row's reason, in every mode."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkd.base.images.source import ImageSource
from mmkd.base.images.uri import image_source
from mmkd.extract.decoding import Threads, decode_windows
from mmkd.extract.isolated_decoding import isolated_windows
from mmkd.extract.teachers.geometry import Geometry

MODES = ("shortest", "longest", "squash", "hf_shortest", "hf_squash", "pad_square")


def geometry(mode: str, color: str = "RGB") -> Geometry:
    """224 pixels."""
    return Geometry(image_size=(224, 224), interpolation="bicubic", resize_mode=mode, fill=0, color=color)


@dataclass(frozen=True)
class Broken(ImageSource):
    """A source that raises what no source should."""

    error: type[Exception]

    def read(self) -> bytes:
        """Raise."""
        raise self.error("Mustermann^Erika")


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1), (1, 9000), (1, 1)])
@pytest.mark.parametrize("mode", MODES)
def test_a_thin_image_is_refused_before_it_is_resized_or_done_in_bounded_memory(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    Image.new("L", size, 9).save(tmp_path / "thin.png")
    Image.new("L", (30, 20), 9).save(tmp_path / "good.png")
    sources = [image_source(str(tmp_path), name) for name in ("thin.png", "good.png")]
    ((thin, good),) = decode_windows(sources, [geometry(mode)], 8, Threads(1, 1))
    assert good.reason is None
    refused = max(size) == 100_000 and mode in ("shortest", "hf_shortest", "pad_square")
    if refused:
        assert thin.reason is not None
        assert "too thin" in thin.reason
    assert thin.reason is None or thin.reason.startswith("image: ")


@pytest.mark.parametrize("error", [MemoryError, ValueError, RuntimeError, KeyError])
def test_any_exception_is_the_rows(error: type[Exception], tmp_path: Path) -> None:
    Image.new("L", (30, 20), 9).save(tmp_path / "good.png")
    sources = [Broken(tmp_path, error), image_source(str(tmp_path), "good.png")]
    ((bad, good),) = decode_windows(sources, [geometry("shortest")], 8, Threads(1, 1))
    assert bad.reason == f"image: cannot be used ({error.__name__})"
    assert good.reason is None


@pytest.mark.integration
def test_the_isolated_decoder_gives_the_same(tmp_path: Path) -> None:
    Image.new("L", (1, 100_000), 9).save(tmp_path / "thin.png")
    Image.new("L", (30, 20), 9).save(tmp_path / "good.png")
    sources = [image_source(str(tmp_path), name) for name in ("thin.png", "good.png", "none.png")]
    shapes = [geometry("shortest")]
    (plain,) = decode_windows(sources, shapes, 8, Threads(1, 1))
    (isolated,) = isolated_windows(sources, shapes, 8, seconds=60, keep=None, beat=lambda: None)
    assert [image.reason for image in isolated] == [image.reason for image in plain]
    assert np.array_equal(isolated[1].pixels[shapes[0]], plain[1].pixels[shapes[0]])


def test_out_of_memory_behind_the_decoder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resize(*_: object, **__: object) -> None:
        raise MemoryError

    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr("mmkd.extract.teachers.geometry.resize", resize)
    ((only,),) = decode_windows([image_source(str(tmp_path), "a.png")], [geometry("hf_shortest")], 8, Threads(1, 1))
    assert only.reason == "image: cannot be used (MemoryError)"
    assert only.image_sha256 is not None


def test_lab_before_a_grey_teacher(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("LAB", (30, 20), (128, 128, 128)).save(buffer, "TIFF")
    (tmp_path / "lab.tif").write_bytes(buffer.getvalue())
    source = image_source(str(tmp_path), "lab.tif")
    ((only,),) = decode_windows([source], [geometry("pad_square", "L")], 8, Threads(1, 1))
    assert only.reason is None
    assert np.abs(next(iter(only.pixels.values())).astype(int)[0, 112, 112] - 119) <= 2
