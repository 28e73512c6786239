"""The benchmarks' shape: every script can be imported, rows judge themselves, the page says what was measured."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
# `mmkd.benchmarks` is the checkout's own folder: the installed package does not carry it.
sys.path.append(str(ROOT / "build" / "types"))
pytest.importorskip("mmkd.benchmarks.result", reason="benchmarks are part of the checkout")

from mmkd.benchmarks.page import Result, figure, render  # noqa: E402
from mmkd.benchmarks.result import ROWS, Row  # noqa: E402
from mmkd.benchmarks.run import benchmarks, run_one  # noqa: E402
from mmkd.benchmarks.where import Machine, describe_machine  # noqa: E402

MACHINE = Machine(
    processor="A CPU", cores=2, memory_gb=24, system="Linux", gpus=(), versions={"numpy": "2.0"}, peers={"lance": "1.2"}
)


def result(name: str, *rows: Row, date: str = "2026-01-02", machine: Machine = MACHINE) -> Result:
    about = "Measures a thing\nwell.\n\nNot told."
    return Result(name=name, about=about, date=date, seconds=90, full=False, machine=machine, rows=rows)


@pytest.mark.parametrize("script", benchmarks(), ids=lambda path: path.stem)
def test_every_benchmark_imports_and_measures_rows(script: Path) -> None:
    module = importlib.import_module(f"mmkd.benchmarks.{script.stem}")
    (full, *options), returns = inspect.signature(module.measure).parameters.values(), module.measure.__annotations__
    assert (str(full), returns["return"]) == ("full: 'bool'", "list[Row]")
    assert all(option.default is not option.empty for option in options)
    assert module.__doc__


def test_the_scripts_found_are_those_with_a_measure() -> None:
    names = [script.stem for script in benchmarks()]
    assert names[:3] == ["store", "extract", "distill"]
    assert not {"run", "page", "result", "where", "distillation"} & set(names)


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (Row(what="a", value=3, reference=2, goal="<= 1.5"), 1.5, True),
        (Row(what="a", value=3, reference=2, goal="< 1.5"), 1.5, False),
        (Row(what="a", value=3, reference=2, ratio=0.5, goal=">= 0.8"), 0.5, False),
        (Row(what="a", value=0.9, unit="s", goal="< 1"), None, True),
        (Row(what="a", value=2, goal="> 1"), None, True),
        (Row(what="a", ratio=2), 2, None),
    ],
)
def test_a_row_divides_and_judges_itself(row: Row, ratio: float | None, met: bool | None) -> None:
    assert row.ratio == ratio
    assert row.met() is met
    assert ROWS.validate_json(ROWS.dump_json([row], exclude_defaults=True)) == [row]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"what": "a"}, "neither a value nor a ratio"),
        ({"what": "a", "value": 1, "goal": "about 1"}, "goal 'about 1' of 'a'"),
        ({"what": "a", "value": float("nan")}, "finite number"),
        ({"what": "a", "value": 1, "units": "s"}, "Extra inputs"),
    ],
)
def test_a_row_that_says_nothing_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Row.model_validate(given)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0, "0"),
        (0.00012, "1.20e-04"),
        (0.0512, "0.0512"),
        (1.234, "1.23"),
        (99.94, "99.9"),
        (2.9e6, "2,900,000"),
    ],
)
def test_figures_have_three_digits(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_the_page_has_ratios_goals_machine_versions_and_date() -> None:
    rows = (
        Row(what="batches", against="RAM", value=6, reference=8, unit="GB/s", goal=">= 0.5", note="a|b"),
        Row(what="batches", against="webdataset", value=6, reference=3, unit="GB/s", goal=">= 25"),
    )
    page = render([result("store", *rows)], ("store", "extract"))
    assert "| batches | RAM | 6 GB/s | 8 GB/s | 0.75 | >= 0.5: met | a\\|b |" in page
    assert "| batches | webdataset | 6 GB/s | 3 GB/s | 2 | >= 25: **missed** |  |" in page
    assert "## `store`\nMeasures a thing well.\n\n2026-01-02, at the size for two cores, 1.5 minutes.\n" in page
    assert "Not told" not in page
    assert "- A CPU, 2 cores, 24 GB of memory; Linux" in page
    assert "numpy 2.0" in page
    assert "lance 1.2" in page
    assert "- not measured here: `extract`" in page


def test_gpu_rows_have_a_table_of_their_own_and_only_where_there_are_some() -> None:
    row = Row(what="a step", value=1, unit="ms")
    without = render([result("distill", row)], ("distill",))
    assert "no GPU: nothing on this page was measured on one" in without
    assert without.count("| what |") == 1
    machine = MACHINE.model_copy(update={"gpus": ("H100",)})
    rows = (row, row.model_copy(update={"device": "gpu", "value": 2}))
    page = render([result("distill", *rows, machine=machine)], ("distill",))
    cpu, _, gpu = page.partition("\nOn H100:\n")
    assert "| a step |  | 1 ms |" in cpu
    assert "| a step |  | 2 ms |" in gpu
    assert "no GPU" not in page


def test_results_of_another_machine_or_other_versions_are_left_out() -> None:
    row = Row(what="a", value=1)
    older = MACHINE.model_copy(update={"versions": {"numpy": "1.26"}})
    page = render(
        [result("store", row, date="2026-01-01", machine=older), result("extract", row)], ("store", "extract")
    )
    assert "- not measured here: `store`" in page
    assert "## `store`" not in page
    # Peers alone do not part two results: a script that needs none may have run before they were there.
    bare = MACHINE.model_copy(update={"peers": {}})
    both = render([result("store", row), result("extract", row, date="2026-01-03", machine=bare)], ("store", "extract"))
    assert "## `store`" in both
    assert "lance 1.2" in both


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.cores >= 1
    assert machine.memory_gb >= 1
    assert machine.versions["numpy"][0].isdigit()


def test_a_failing_script_keeps_the_old_result(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script, out = tmp_path / "short.py", tmp_path / "short.json"
    head = '"""Short."""\nfrom mmkd.benchmarks.result import Row, main\n'
    script.write_text(head + "main(lambda full: [Row(what='a', value=2 if full else 1)])\n")
    assert run_one(script, out, full=True)
    kept = Result.model_validate_json(out.read_text())
    assert (kept.name, kept.about, kept.full) == ("short", "Short.", True)
    assert kept.rows == (Row(what="a", value=2),)
    script.write_text(head + "raise SystemExit(3)\n")
    assert not run_one(script, out, full=False)
    assert Result.model_validate_json(out.read_text()) == kept
    assert "short ended with status 3" in capfd.readouterr().err


@pytest.mark.integration
def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    command = [sys.executable, "-P", str(FOLDER / "run.py"), "--only", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no benchmark 'nonsense': there are store, extract, distill" in done.stderr


def test_an_interval_is_students_t_corrected_for_the_number_of_comparisons() -> None:
    pytest.importorskip("open_clip", reason="the harness trains students")
    from mmkd.benchmarks.distillation import half_width

    values = [0.1, 0.2, 0.3, 0.4, 0.5]  # deviation sqrt(0.025); t at 0.975 and 0.9975 with 4 degrees of freedom
    assert half_width(values, 1) == pytest.approx(2.776445 * 0.025**0.5 / 5**0.5, rel=1e-5)
    assert half_width(values, 10) == pytest.approx(5.597568 * 0.025**0.5 / 5**0.5, rel=1e-5)


def test_recipes_without_all_seeds_are_marked_as_not_run() -> None:
    pytest.importorskip("open_clip", reason="the harness trains students")
    from mmkd.benchmarks.distillation import ALONE, REFERENCE, table

    found = {0: {"bacc": 0.5, "auroc": 0.75}, 1: {"bacc": 0.6, "auroc": 0.85}}
    better = {seed: {"bacc": one["bacc"] + 0.25, "auroc": 1.0} for seed, one in found.items()}
    lines = table("clean", {REFERENCE: better, ALONE: found, "half done": {0: found[0]}}, [0, 1]).splitlines()
    assert lines[2:] == [
        f"| {REFERENCE} | 80.0 (7.1) | 100.0 | +25.0 ± 0.0 |  |",
        f"| {ALONE} | 55.0 (7.1) | 80.0 |  | -25.0 ± 0.0 |",
        "| half done | not run | | | |",
    ]


def test_every_recipe_of_the_harness_is_a_run_that_can_be_written() -> None:
    pytest.importorskip("open_clip", reason="the harness trains students")
    from mmkd.benchmarks.distillation import RECIPES, SCENARIOS, SHORT, run_config

    assert set(SHORT) <= set(RECIPES)
    assert SCENARIOS["found"].wrong == 0.4
    for recipe in RECIPES.values():
        run_config(recipe, seed=3)
    assert run_config(RECIPES["pairs alone"], seed=3).loss.teacher_terms == ()
    assert run_config({}, seed=3).loss.teacher_terms == ("feature", "relational")


def test_a_student_from_random_weights_has_recipes_of_its_own_and_no_detection() -> None:
    pytest.importorskip("open_clip", reason="the harness trains students")
    from mmkd.benchmarks.distillation import ALONE, RECIPES, SHORT, detection, recipes_of

    assert recipes_of("random weights, found") == (ALONE, "distil, task 0.1")
    assert recipes_of("clean") == tuple(RECIPES)
    assert recipes_of("second, clean") == SHORT
    assert detection({"random weights, found": {ALONE: {0: {"detection": 0.9}}}}, [0]).count("\n") == 2


def test_padding_does_not_change_what_a_random_text_tower_says() -> None:
    pytest.importorskip("open_clip", reason="the harness trains students")
    import torch

    from mmkd.benchmarks.random_towers import TEXT_WIDTH, TextTower

    torch.manual_seed(0)
    tower = TextTower(vocabulary=9).eval()
    padded = tower(torch.tensor([[3, 5, 8, 0, 0], [1, 2, 4, 6, 7]]))
    assert padded.shape == (2, TEXT_WIDTH)
    torch.testing.assert_close(padded[:1], tower(torch.tensor([[3, 5, 8]])), atol=1e-6, rtol=0)
