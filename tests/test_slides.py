"""Whole slides as bags of tiles: a made slide whose tissue is known, the two real ones, and slides that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmkd.base.errors import CorpusError
from mmkd.base.images.decoding import decode
from mmkd.base.images.source import ImageError
from mmkd.base.images.uri import image_source
from mmkd.extract.corpora import CorpusRow, corpus_rows, open_corpus
from mmkd.extract.corpora.slides import tissue
from mmkd.extract.index import create_indexed_store
from mmkd.store import FeatureStore

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "wsi"
tifffile = pytest.importorskip("tifffile", reason="tifffile writes the test's slides; it comes with scikit-image")
PINK = (200, 120, 170)


def write_slide(path: Path, mpp: float | None = 0.25) -> np.ndarray:
    """A tiled TIFF of 1024 x 768: glass, a pink block at x 256..768, y 128..512, and a black border on the right."""
    pixels = np.full((768, 1024, 3), 243, dtype=np.uint8)
    pixels[128:512, 256:768] = PINK
    pixels[:, :, 0] -= np.arange(768, dtype=np.uint8)[:, None] % 3  # so that no two rows are the same
    pixels[:, 960:] = 0
    options = {} if mpp is None else {"resolution": (10_000 / mpp, 10_000 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **options)
    return pixels


def rows_of(folder: Path, options: str) -> tuple[str, list[CorpusRow]]:
    """The corpus' root and rows."""
    (folder / "corpus.yaml").write_text(f"kind: slides\n{options}\n")
    corpus = open_corpus(str(folder / "corpus.yaml"))
    return corpus.root, list(corpus_rows(corpus))


def test_tiles_lie_where_the_tissue_is(tmp_path: Path) -> None:
    pixels = write_slide(tmp_path / "TCGA-AB-1234-01Z-00-DX1.tiff")
    root, rows = rows_of(tmp_path, "path: .\ntile: 64\nmpp: 0.5\nmin_tissue: 1.0")
    # 64 pixels at 0.5 are 128 of the slide's: four columns and three rows of the block.
    corners = [(x, y) for y in (128, 256, 384) for x in (256, 384, 512, 640)]
    assert [(int(row.labels["x"] or -1), int(row.labels["y"] or -1)) for row in rows] == corners
    assert {(row.labels["slide"], row.labels["patient"], row.labels["side"]) for row in rows} == {
        ("TCGA-AB-1234-01Z-00-DX1", "TCGA-AB-1234", "128")
    }
    assert rows[5].key == "TCGA-AB-1234-01Z-00-DX1.tiff#384,256"
    tile = np.asarray(decode(image_source(root, rows[5].uri or "").read())).astype(float)
    expected = pixels[256:384, 384:512].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile - expected).max() <= 0.51
    _, more = rows_of(tmp_path, "path: .\ntile: 64\nmpp: 0.25\nmin_tissue: 0.9")
    assert len(more) == 48


def test_regions_are_squares_of_tiles_and_a_slides_own_scale_goes_first(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff")  # says 0.25
    # Columns 2 to 5 and rows 1 to 3 of tiles of 128; squares of two by two of them.
    _, rows = rows_of(tmp_path, "path: a.tiff\ntile: 64\nmpp: 0.5\nmin_tissue: 1.0\nregion: 2\nslide_mpp: 0.5")
    names = [f"a@{column},{row}" for row in (0, 1, 1) for column in (1, 1, 2, 2)]
    assert [row.labels["region"] for row in rows] == names
    assert {row.labels["side"] for row in rows} == {"128"}


def test_labels_from_a_table(tmp_path: Path) -> None:
    write_slide(tmp_path / "one.tiff")
    write_slide(tmp_path / "two.tiff")
    (tmp_path / "slides.csv").write_text("slide,patient,grade\none,p7,3\n")
    (tmp_path / "c").mkdir()
    _, rows = rows_of(tmp_path / "c", "path: ..\nslide_table: ../slides.csv\ntile: 128\nmin_tissue: 1")
    found = {(row.labels["slide"], row.labels["patient"], row.labels.get("grade")) for row in rows}
    assert found == {("one", "p7", "3"), ("two", None, None)}
    (tmp_path / "slides.csv").write_text("slide,x\none,p7\n")
    with pytest.raises(CorpusError, match="column 'x'"):
        rows_of(tmp_path / "c", "path: ..\nslide_table: ../slides.csv")
    (tmp_path / "slides.csv").write_text("name\none\n")
    with pytest.raises(CorpusError, match="no column 'slide'"):
        rows_of(tmp_path / "c", "path: ..\nslide_table: ../slides.csv")
    (tmp_path / "slides.csv").write_text("slide,grade\none\n")
    with pytest.raises(CorpusError, match="line 2 has 1 cells, expected 2"):
        rows_of(tmp_path / "c", "path: ..\nslide_table: ../slides.csv")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("mpp: 0.1", "row: slide: scanned coarser than the mpp asked for"),
        ("mpp: 20", "row: slide: smaller than one tile"),
    ],
)
def test_a_slide_that_cannot_be_tiled_is_one_failed_row(tmp_path: Path, options: str, reason: str) -> None:
    write_slide(tmp_path / "a.tiff")
    assert [row.fault for row in rows_of(tmp_path, f"path: a.tiff\n{options}")[1]] == [reason]


def test_damaged_slides_and_slides_without_scale(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff", mpp=None)
    (tmp_path / "b.svs").write_bytes(b"no slide")
    write_slide(tmp_path / "c.tiff")
    _, rows = rows_of(tmp_path, "path: .\ntile: 128\nmin_tissue: 1")
    assert [row.fault for row in rows[:2]] == [
        "row: slide: does not say its micrometers per pixel (set slide_mpp)",
        "row: slide: damaged or not a slide",
    ]
    assert all(row.fault is None for row in rows[2:])
    assert len(rows) == 2 + 2
    assert all(row.fault is None for row in rows_of(tmp_path, "path: a.tiff\nslide_mpp: 0.25\ntile: 128")[1])
    with pytest.raises(ImageError, match="not a slide"):
        image_source(str(tmp_path), "b.svs#x=0&y=0&side=64&out=32").read()
    with pytest.raises(ImageError, match="cannot be read"):
        image_source(str(tmp_path), "c.tiff#x=0&y=0&side=64&out=9999999").read()
    with pytest.raises(ImageError, match="more than"):
        image_source(str(tmp_path), "c.tiff#x=0&y=0&side=99999999&out=224").read()


def test_tissue_is_coloured_and_not_black() -> None:
    pixels = np.array([[PINK, (243, 243, 243), (0, 0, 0), (12, 0, 3), (240, 236, 241)]], dtype=np.uint8)
    assert tissue(pixels).tolist() == [[True, False, False, False, False]]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_the_two_real_slides(tmp_path: Path) -> None:
    create_indexed_store(open_corpus(str(SHARED)), tmp_path / "s")
    store = FeatureStore.open(tmp_path / "s")
    rows = store.sample_table().to_pylist()
    by_slide = {name: [row for row in rows if row["slide"] == name] for name in {row["slide"] for row in rows}}
    assert set(by_slide) == {"cmu-1-small-region", "tcga-cr-7395-01a-01-ts1"}
    assert {row["patient"] for row in by_slide["tcga-cr-7395-01a-01-ts1"]} == {"TCGA-CR-7395"}
    assert {name: len(found) for name, found in by_slide.items()} == {
        "cmu-1-small-region": 56,  # of 117 places of its grid: the rest is glass
        "tcga-cr-7395-01a-01-ts1": 1,
    }
    # The tissue array says neither its micrometers nor its objective, and nobody guesses.
    assert by_slide["tcga-cr-7395-01a-01-ts1"][0]["reason"] == (
        "row: slide: does not say its micrometers per pixel (set slide_mpp)"
    )
    (tmp_path / "c.yaml").write_text(f"kind: slides\npath: {SHARED}/tcga-cr-7395-01a-01-ts1.svs\nslide_mpp: 0.25\n")
    assert len(list(corpus_rows(open_corpus(str(tmp_path / "c.yaml"))))) > 10
    root = store.record.corpus.root
    shown = [decode(image_source(root, row["uri"]).read()) for row in by_slide["cmu-1-small-region"][::8]]
    assert {picture.size for picture in shown} == {(224, 224)}
    # Tissue is coloured and structured; glass is neither.
    assert all(np.asarray(picture).std() > 10 for picture in shown)
