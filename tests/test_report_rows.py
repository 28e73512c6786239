"""The page's rows, colours and contrast, what it prints, and where it is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from planted_faults import HOLE, ROWS, make_faults

pytest.importorskip("plotly", reason="the extra inspect is not installed")
pytest.importorskip("jinja2", reason="the extra inspect is not installed")

from mmkd.base.install import install_command
from mmkd.cli.main import cli
from mmkd.store import FeatureStore
from mmkd.store.inspect.sampling import unit
from mmkd.store.report import charts
from mmkd.store.report.content import SHOWN_ROWS, Content, Options, teacher_colors
from mmkd.store.report.page import write_report

CSS = Path(__file__).resolve().parents[1] / "store" / "report" / "page.css"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return FeatureStore.open(make_faults(tmp_path_factory.mktemp("faults"), ("base", "holed", "noise")))


@pytest.fixture(scope="module")
def page(store: FeatureStore, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    out = tmp_path_factory.mktemp("page") / "page.html"
    return out, write_report(store, out, Options(seed=3))


def test_some_rows_are_shown_with_their_cosines(store: FeatureStore, page: tuple[Path, Content]) -> None:
    path, content = page
    assert len(content.shown) == SHOWN_ROWS
    section = path.read_text().partition('<section id="rows">')[2].partition("</section>")[0]
    for row, cosines in content.shown.items():
        assert set(cosines) == {"base", "noise"} | ({"holed"} if row // 256 != HOLE else set())
        own = unit(store.image("base")[[row]])[0] @ unit(store.text("base")[[row]])[0]
        assert cosines["base"] == pytest.approx(float(own), abs=1e-6)
        assert f"row:{row}</code>" in section
        assert content.samples[row].caption in section
        for value in cosines.values():
            assert f">{value:.3f}</a>" in section


def test_rows_are_colored_by_who_has_them_and_whose_caption_fits_best(store: FeatureStore) -> None:
    rows = np.arange(700, 800)
    level = np.linspace(0.1, 0.2, len(rows), dtype=np.float32)
    cosines = np.stack([level + 0.5, level, level])  # the first is higher everywhere: that alone is no fit
    cosines[1, 40] = 0.4  # less than any of the first, and far more than its own others
    cosines[2, 41] = 0.4
    cosines[2, 68:] = np.nan
    found = teacher_colors(store, ("base", "noise", "holed"), rows, cosines)
    assert [found["teachers"][row] for row in (700, 767, 768, 799)] == ["all", "all", "all but holed", "all but holed"]
    assert [found["best teacher"][row] for row in (740, 741)] == ["noise", "holed"]
    assert set(found["best teacher"].values()) == {"base", "noise", "holed"}
    # Too few rows to know what is usual: nothing is said.
    assert list(teacher_colors(store, ("base", "noise"), rows[:10], cosines[:2, :10])) == ["teachers"]


def test_the_map_offers_modality_teachers_and_failures(page: tuple[Path, Content]) -> None:
    colors = page[1].colors
    assert list(colors)[:4] == ["modality", "status", "teachers", "best teacher"]
    assert set(colors["status"].values()) == {"ok", "partial: image: truncated"}
    rows = {int(row) for found in page[1].projections for row in found.rows}
    assert all(rows <= set(values) for values in colors.values())


def test_agreement_of_an_unrelated_teacher_is_about_zero_on_screen_and_page(tmp_path: Path) -> None:
    root = make_faults(tmp_path, ("base", "noise", "rotated", "same"))
    said = CliRunner().invoke(cli, ["store", "stats", str(root)]).stdout.splitlines()
    at = next(i for i, line in enumerate(said) if line.strip().startswith("images: linear CKA"))
    noise, rotated, same = said[at + 2].split()[2:]
    assert abs(float(noise)) < 0.02
    assert (rotated, same) == ("1.00", "1.00")
    write_report(FeatureStore.open(root), tmp_path / "p.html", Options())
    table = (tmp_path / "p.html").read_text().partition("<caption>images, linear CKA</caption>")[2]
    (row,) = re.findall(r'<th scope="row">base</th>(.*?)</tr>', table.partition("</table>")[0])
    own, noise, rotated, same = re.findall(r">(-?[0-9.]+)</a>", row)
    assert (own, rotated, same) == ("1.00", "1.00", "1.00")
    assert abs(float(noise)) < 0.02


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb or #rgb (WCAG 2.2)."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_every_ink_has_contrast_on_every_ground_in_light_dark_and_print() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21)
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]+);", block)) for block in re.findall(r":root \{(.*?)\}", CSS.read_text())
    ]
    assert len(schemes) == 3
    for scheme in (schemes[0] | changed for changed in ({}, *schemes[1:])):
        for ink in ("ink", "soft", "link", "fault", "warning"):
            for ground in ("ground", "panel"):
                assert contrast(scheme[ink], scheme[ground]) >= 4.5, (ink, ground, scheme)
        assert contrast(scheme["fault"], scheme["mark"]) >= 4.5
    # Figures in the cells of heat maps, which look the same in light and dark.
    for _, ground in charts._AGREEMENT_SCALE:
        assert contrast(charts._INK, ground) >= 4.5
    # Lines and marks of the charts: 3 on either panel, for what is told by colour and by nothing else.
    for scheme in schemes[:2]:
        assert contrast("#0072B2", scheme["panel"]) >= 3
        assert contrast("#D55E00", scheme["panel"]) >= 3


def test_a_page_is_written_into_a_folder_that_is_not_there(store: FeatureStore, tmp_path: Path) -> None:
    out = tmp_path / "reports" / "2026" / "page.html"
    done = CliRunner().invoke(cli, ["store", "report", str(store.root), str(out), "--teachers", "base"])
    assert done.exit_code == 0, done.output
    assert out.is_file()
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    assert "\n\n" not in done.stdout


def test_a_page_with_umap_needs_its_package(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    words = ["store", "report", str(store.root), str(tmp_path / "p.html"), "--projection", "umap"]
    assert install_command("umap") in str(CliRunner().invoke(cli, words).exception)
    assert not (tmp_path / "p.html").exists()


def test_a_page_with_umap_says_so(store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Planar:
        """Stands in for UMAP, which takes a minute to compile: the first two features."""

        def __init__(self, **options: Any) -> None:
            given.update(options)

        def fit_transform(self, values: np.ndarray) -> np.ndarray:
            return values[:, :2]

    monkeypatch.setitem(__import__("sys").modules, "umap", type("umap", (), {"UMAP": Planar}))
    out = tmp_path / "p.html"
    words = ["--projection", "umap", "--seed", "9", "--teachers", "base"]
    done = CliRunner().invoke(cli, ["store", "report", str(store.root), str(out), *words])
    assert done.exit_code == 0, done.output
    assert given["random_state"] == 9
    assert given["metric"] == "cosine"
    text = out.read_text()
    assert '"method":"umap","explained":null' in text
    assert "--teachers base --seed 9 --projection umap --json" in text


@pytest.mark.slow
def test_pictures_and_folded_tables_are_there_when_the_page_is_printed(browser: Any, tmp_path: Path) -> None:
    root = make_faults(tmp_path, ("base", "noise"))
    for row in range(8, ROWS):
        shutil.copy(tmp_path / "corpus" / "3.png", tmp_path / "corpus" / f"{row}.png")
    write_report(FeatureStore.open(root), tmp_path / "p.html", Options())
    tab = browser.new_page(viewport={"width": 800, "height": 300})
    tab.goto((tmp_path / "p.html").as_uri())
    tab.wait_for_selector("#chart-map .scatterlayer .point")
    # Without a scroll: what is far below the window is on the paper too.
    assert tab.evaluate("document.images.length") >= SHOWN_ROWS + 8
    assert tab.evaluate("[...document.images].filter((image) => !image.complete || !image.naturalWidth).length") == 0
    folded = "[...document.querySelectorAll('details')].filter((element) => !element.open).length"
    before = tab.evaluate(folded)
    assert before >= 2
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate(folded) == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate(folded) == before
    tab.select_option("#map-color", label="best teacher")
    assert tab.text_content("#chart-map .legend") in ("basenoise", "noisebase")
    tab.close()
