"""Pictures of rows: inside the corpus, and drawn as the terminal says that it can."""

from __future__ import annotations

import re
import sys

import pytest
from planted_faults import make_faults
from terminal import in_terminal

from mmkd.base.images.source import ImageError
from mmkd.cli.store.show import draw
from mmkd.store import FeatureStore, UserError
from mmkd.store.inspect.pictures import picture, thumbnail
from mmkd.store.inspect.rows import sample_rows

PLANTED = ("base", "broken", "holed", "noise")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(make_faults(tmp_path_factory.mktemp("faults"), PLANTED))


def test_pictures_stay_inside_the_corpus(faults: FeatureStore) -> None:
    record = faults.record
    sample = sample_rows(faults, [3, 9]).to_pylist()
    assert picture(record, sample[0]).size == (43, 30)
    assert thumbnail(picture(record, sample[0]), 16)[:2] == b"\xff\xd8"
    with pytest.raises(ImageError, match="file not found"):
        picture(record, sample[1])
    with pytest.raises(ImageError, match="leads out of the corpus"):
        picture(record, sample[0] | {"uri": "../store/zarr.json"})
    with pytest.raises(ImageError, match="the row has no image"):
        picture(record, sample[0] | {"uri": None})


def test_a_preview_needs_a_terminal_and_its_package(faults: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(faults.record, sample_rows(faults, [3]).to_pylist()[0])
    with pytest.raises(UserError, match="standard output is not one"):
        draw(image)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "textual_image.renderable", None)
    with pytest.raises(UserError, match=r"needs the package 'textual_image\.renderable'.*\[terminal\]"):
        draw(image)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("answers", "drawn"),
    [
        ({b"\x1b[c": b"\x1b[?62;4;22c"}, rb"\x1bP[0-9;]*q.*\x1b\\"),  # VT level 2 with Sixel
        (
            {b"\x1b[c": b"\x1b[?62;22c", b"\x1b_G": b"\x1b_Gi=31;OK\x1b\\"},
            rb"\x1b_G[^\x1b]*f=100[^\x1b]*;iVBOR",
        ),  # Kitty
        ({}, rb"\x1b\[38;2;90;80;200;48;2;90;80;200m\xe2\x96\x80"),  # a terminal that says nothing: half blocks
    ],
    ids=["sixel", "kitty", "blocks"],
)
def test_a_picture_is_drawn_as_the_terminal_says_it_can(
    faults: FeatureStore, answers: dict[bytes, bytes], drawn: bytes
) -> None:
    pytest.importorskip("textual_image", reason="the extra terminal is not installed")
    status, said = in_terminal(["store", "show", str(faults.root), "row:3", "--image"], answers)
    assert status == 0, said
    assert re.search(drawn, said, re.DOTALL), said[-2000:]
    assert b"caption 3" in said
