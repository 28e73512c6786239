"""The page: what it tells of planted faults, that captions stay text, and how it behaves in a real browser."""

from __future__ import annotations

import json
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from planted_faults import SCRIPT, make_faults
from tiny_store import make_index

from mmkd.store import FeatureStore, UserError
from mmkd.store.record import CorpusRecord
from mmkd.store.writer import create_store

pytest.importorskip("plotly", reason="the extra inspect is not installed")
pytest.importorskip("jinja2", reason="the extra inspect is not installed")

from mmkd.cli.main import cli
from mmkd.cli.store.report import report
from mmkd.store.report.content import Content, Options
from mmkd.store.report.page import write_report

pytestmark = pytest.mark.integration

RELEASE = Path(__file__).resolve().parents[2] / "shared" / "data" / "mmkd_release"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Content]:
    folder = tmp_path_factory.mktemp("page")
    root = make_faults(folder)
    return folder / "page.html", write_report(FeatureStore.open(root), folder / "page.html", Options())


def embedded(path: Path) -> Any:
    """The data that the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_everything_and_points_nowhere(page: tuple[Path, Content]) -> None:
    text = page[0].read_text()
    assert page[0].stat().st_size < 10_000_000
    assert "default-src &#39;none&#39;" in text
    own = text[: text.index('<script type="application/json"')]
    assert not re.findall(r'(?:src|href)="(?!#|data:)', own)
    assert "http://" not in own
    assert "https://" not in own


def test_every_planted_fault_is_on_the_page(page: tuple[Path, Content]) -> None:
    text = page[0].read_text()
    for fault in (
        "holed lacks 1 of 5 shards (3)",
        "broken image: 1 row not finite and 1 zero",
        "dead image: 1 dead dimension of 32 (5)",
        "shifted: captions are shifted by +1: images have a mean cosine of 0.930",
        "noise: captions do not fit images",
        "1 row with an earlier row&#39;s image feature (files not hashed): rows 10, 20",
        "22 rows (2.0%) failed in part or whole",
        "see images alike",
    ):
        assert fault in text, fault
    data = embedded(page[0])
    assert data["charts"]["coverage"]["data"][0]["z"] is not None
    assert {found["teacher"] for found in data["map"]["projections"]} == set(page[1].info.cards)


FAULTS = {
    # What to look for, and where: `info` reads the ledger and the sample table, `stats` and `report` features too.
    "holed lacks 1 of 5 shards (3)": ("info", "stats", "report"),
    "22 rows (2.0%) failed in part or whole": ("info", "stats", "report"),
    "broken image: 1 row not finite and 1 zero although called sound (row 40, 41)": ("stats", "report"),
    "dead image: 1 dead dimension of 32 (5)": ("stats", "report"),
    "dead image: 1 constant dimension of 32 (7)": ("stats", "report"),
    "1 row with an earlier row's image feature (files not hashed): rows 10, 20": (
        "stats",
        "report",
    ),
    "shifted: captions are shifted by +1: images have a mean cosine of 0.930": ("stats", "report"),
    "noise: captions do not fit images": ("stats", "report"),
    "base and broken and rotated and same and shifted see images alike (CKA 1.0000": ("stats", "report"),
}


def test_every_planted_fault_is_seen_where_its_cause_is_read(page: tuple[Path, Content]) -> None:
    root = page[1].info.summary.root
    printed = {
        "info": CliRunner().invoke(cli, ["store", "info", root]).stdout,
        "stats": CliRunner().invoke(cli, ["store", "stats", root]).stdout,
        "report": unescape(page[0].read_text()),
    }
    data = {
        name: json.loads(CliRunner().invoke(cli, ["store", name, root, "--json"]).stdout) for name in ("info", "stats")
    }
    texts = {name: [finding["text"] for finding in content["findings"]] for name, content in data.items()}
    for fault, places in FAULTS.items():
        assert [name for name in printed if fault in printed[name]] == list(places), fault
        for name, found in texts.items():
            assert any(fault in text for text in found) == (name in places), fault
    assert "mmkd store stats" in printed["info"].splitlines()[-1]


@pytest.mark.integration
def test_every_number_leads_to_a_command_that_gives_it(page: tuple[Path, Content]) -> None:
    text = page[0].read_text()
    commands = {
        name: unescape(line)
        for name, line in re.findall(r'<dt id="command-([^"]+)">.*?</dt><dd><code>(.*?)</code>', text)
    }
    cells = re.findall(r'<td class="n[^"]*">(.*?)</td>', text)
    assert len(cells) > 350
    for cell in cells:
        found = re.fullmatch(r'<a class="number" href="#command-([^"]+)" title="[^"]+" tabindex="-1">[^<]+</a>', cell)
        assert found is not None, cell
        assert found[1] in commands
    assert set(re.findall(r'href="#command-([^"]+)"', text)) <= set(commands)
    # The commands are real: each runs as it stands, once its placeholder is filled in.
    for name, line in commands.items():
        words = [{"KEY": "k3", "shard:N": "shard:3"}.get(word, word) for word in shlex.split(line)]
        words += ["row:3"] if name == "row" else []
        words = [str(page[0].parent / word) if word in ("report.html", "rows.parquet") else word for word in words]
        assert words[0] == "mmkd"
        done = CliRunner().invoke(cli, words[1:])
        assert done.exit_code == 0, (line, done.output)
    # And gives the number: the broken rows of `broken`, from the command that its cell links to.
    (row,) = re.findall(r"<th scope=\"row\">broken images</th>(.*?)</tr>", text)
    told = re.findall(r'href="#command-([^"]+)"[^>]*>([^<]+)<', row)
    assert told[1] == ("stats-broken", "2")
    found = CliRunner().invoke(cli, [*shlex.split(commands["stats-broken"])[1:], "--json"])
    tower = json.loads(found.stdout)["towers"][0]
    assert tower["not_finite"] + tower["zero"] == 2


def test_a_caption_is_text_in_the_markup_and_in_the_data(page: tuple[Path, Content]) -> None:
    text = page[0].read_text()
    assert "<script>alert(1)" not in text
    assert page[1].samples[0].caption == SCRIPT
    assert embedded(page[0])["map"]["samples"]["0"]["caption"] == SCRIPT


def test_missing_pictures_do_no_harm(page: tuple[Path, Content]) -> None:
    samples = page[1].samples
    assert samples[0].thumbnail is not None
    assert (samples[49].thumbnail, samples[49].no_picture) == (None, "file not found")
    assert page[1].pictures_missing > 500
    assert "could not be shown" in page[0].read_text()


def test_pages_of_a_store_without_features_and_of_one_row(tmp_path: Path) -> None:
    corpus = CorpusRecord(kind="test", location="here", root="/nowhere", rows=1, labels=("site",), digest="d")
    create_store(tmp_path / "s", corpus, make_index(1))
    content = write_report(FeatureStore.open(tmp_path / "s"), tmp_path / "p.html", Options())
    assert content.projections == ()
    assert "No teacher has sound features yet." in (tmp_path / "p.html").read_text()


def test_bad_input_is_one_line(page: tuple[Path, Content], tmp_path: Path) -> None:
    root = page[1].info.summary.root
    for arguments, message in (
        ([root, str(tmp_path / "page.txt")], "give one that ends in .html"),
        ([root, str(tmp_path / "p.html"), "--teachers", "nobody"], "has no teacher 'nobody'"),
        ([root, str(tmp_path / "p.html"), "--sample", "0"], "neither a number of rows"),
        ([str(tmp_path), str(tmp_path / "p.html")], "is not an mmkd store"),
    ):
        error = CliRunner().invoke(report, arguments).exception
        assert message in str(error)
        assert "\n" not in str(error)
    with pytest.raises(UserError, match="is not an HTML file"):
        write_report(FeatureStore.open(root), tmp_path, Options())


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the published sample is not beside this checkout")
def test_the_published_features_give_a_careful_page(tmp_path: Path) -> None:
    from mmkd.store.convert.importing import import_features
    from mmkd.store.convert.original import OriginalRelease

    import_features(OriginalRelease(RELEASE), tmp_path / "s", "float16", lambda done, every: None)
    content = write_report(FeatureStore.open(tmp_path / "s"), tmp_path / "p.html", Options())
    text = (tmp_path / "p.html").read_text()
    assert content.findings == ()
    assert "With 4 rows nothing more can be said" in text
    assert "Agreement needs two teachers that share at least 50 sound rows" in text
    assert "All features have unit norm." in text
    assert all(sample.thumbnail for sample in content.samples.values())
    matched = {pair.slug: pair.matched.median for pair in content.statistics.pairs}
    unmatched = {pair.slug: pair.unmatched.median for pair in content.statistics.pairs if pair.pairs > 1}
    assert all(matched[slug] > median for slug, median in unmatched.items())


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
def test_the_page_in_chromium(browser: Any, page: tuple[Path, Content], scheme: str, width: int) -> None:
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    tab = context.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: said.append(dialog.message))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
    tab.goto(page[0].as_uri())
    tab.wait_for_selector("#chart-map .scatterlayer .point")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Keys: Tab reaches the map, arrows go from row to row, Home returns.
    tab.focus("#chart-map")
    tab.keyboard.press("Home")
    assert SCRIPT in tab.inner_text("#card")
    assert tab.locator("#card img").count() == 1
    assert tab.locator("#card script, #card b").count() == 0
    tab.keyboard.press("ArrowRight")
    second = tab.inner_text("#card")
    assert SCRIPT not in second
    tab.keyboard.press("ArrowLeft")
    assert SCRIPT in tab.inner_text("#card")
    # Pointer: hovering another point brings its card.
    # (Waiting for an expression would be `eval`, which the page's own policy forbids.) Plotly drops a move that comes
    # while it is busy: the pointer goes on to further points, as a hand does.
    for point in range(40, 60):
        tab.locator("#chart-map .scatterlayer .point").nth(point).hover(force=True)
        tab.wait_for_timeout(250)
        if SCRIPT not in tab.inner_text("#card"):
            break
    assert SCRIPT not in tab.inner_text("#card")
    # Colour and space can be chosen; status is told by words, not by colour alone.
    tab.select_option("#map-color", label="status")
    assert "partial: image: truncated" in tab.text_content("#chart-map .legend")
    tab.select_option("#map-space", label="noise, captions")
    assert "600 rows" in tab.inner_text("#map-note")
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(17, 22, 28)")
    assert said == []
    context.close()


@pytest.mark.slow
def test_the_page_prints_and_every_control_can_be_reached_by_tab(browser: Any, page: tuple[Path, Content]) -> None:
    tab = browser.new_page()
    tab.goto(page[0].as_uri())
    tab.wait_for_selector("#chart-map .scatterlayer .point")
    assert tab.pdf(print_background=True)[:5] == b"%PDF-"
    reached = set()
    for _ in range(60):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.id"))
    assert {"map-space", "map-color", "chart-map"} <= reached
    unnamed = tab.evaluate(
        "[...document.querySelectorAll('img:not([alt]), [role=img]:not([aria-label]), select, th:not([scope])')]"
        ".filter((element) => element.tagName !== 'SELECT' || !element.labels.length).length"
    )
    assert unnamed == 0
    tab.close()
