"""Structure: arrows between folders, import circles, the package list, no bare names."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from import_graph import import_circle, import_graph

from mmkd.base.install import install_command

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("base", "cli", "demo", "distill", "evaluate", "extract", "store")
PACKAGES = (*STAGES, "suites")
# What a stage may import of ours. The three in the middle never see each other: their contract is the format on disk.
ALLOWED = {
    "base": {"base"},
    "cli": {"base", "cli", "demo", "distill", "evaluate", "extract", "store"},
    "demo": {"base", "demo", "distill", "evaluate", "extract", "store"},
    "distill": {"base", "distill", "store"},
    "evaluate": {"base", "evaluate", "store"},
    "extract": {"base", "extract", "store"},
    "store": {"base", "store"},
}
FORBIDDEN = {
    "base": {"dask", "distributed", "torch", "open_clip", "transformers", "sklearn", "scipy"},
    "demo": {"dask", "distributed"},
    "cli": {"dask", "distributed"},
    "distill": {"dask", "distributed"},
    "evaluate": {"dask", "distributed", "torch", "open_clip", "transformers"},
    "extract": set(),
    "store": {"dask", "distributed", "torch", "open_clip", "transformers", "sklearn", "scipy"},
}
# Heads of attention or of one hidden layer are trained on stored features; nothing else of evaluate/ needs torch.
TORCH_IN_EVALUATE = "evaluate/heads/"
CHECKED = (*STAGES, "tests", "benchmarks", "docs", "examples")


def sources(*folders: str) -> Iterator[Path]:
    """Python files of these folders."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, with line numbers; `import x` inside functions counts too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module or "", node.lineno


@pytest.mark.integration
@pytest.mark.parametrize("stage", STAGES)
def test_imports_go_one_way(stage: str) -> None:
    wrong = []
    for path in sources(stage):
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] == "mmkd" and parts[1] not in ALLOWED[stage]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
            allowed = parts[0] == "torch" and str(path.relative_to(ROOT)).startswith(TORCH_IN_EVALUATE)
            if parts[0] in FORBIDDEN[stage] and not allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {parts[0]}")
            if parts[0] in STAGES:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name} by its bare name")
    assert wrong == []


@pytest.mark.integration
def test_no_files_import_each_other_in_a_circle(tmp_path: Path) -> None:
    assert import_circle(import_graph(ROOT, STAGES)) == []
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a.py").write_text("def f():\n    from mmkd.store import b\n")
    (tmp_path / "store/b.py").write_text("if TYPE_CHECKING:\n    from mmkd.store.a import f\n")
    assert set(import_circle(import_graph(tmp_path, ["store"]))) == {"mmkd.store.a", "mmkd.store.b"}


def test_the_format_knows_nothing_of_what_is_built_on_it() -> None:
    above = ("mmkd.store.inspect", "mmkd.store.report", "mmkd.store.selection.", "mmkd.store.convert")
    wrong = [
        f"{module} imports {name}"
        for module, names in import_graph(ROOT, ["store"]).items()
        for name in names
        if module.count(".") <= 2
        and not module.startswith(above)
        and name.split(".", 3)[:3] in [a.split(".") for a in above]
    ]
    assert wrong == []


@pytest.mark.integration
def test_every_module_says_what_it_is_for() -> None:
    assert [
        str(p.relative_to(ROOT)) for p in sources(*CHECKED) if not ast.get_docstring(ast.parse(p.read_text()))
    ] == []


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "misc"}
    assert [p for p in sources(*CHECKED) if p.stem in drawers or drawers & set(p.relative_to(ROOT).parts[:-1])] == []


@pytest.mark.integration
def test_no_test_imports_another_test() -> None:
    tests = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    wrong = [f"{path.name} imports {name}" for path in sources("tests") for name, _ in imports(path) if name in tests]
    assert wrong == []


def test_setup_cfg_lists_every_package() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    there = [
        "mmkd." + ".".join(path.parent.relative_to(ROOT).parts)
        for stage in PACKAGES
        for path in sorted((ROOT / stage).rglob("__init__.py"))
    ]
    assert sorted(listed) == sorted(there)
    assert all((ROOT / stage / "py.typed").is_file() for stage in PACKAGES)


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['mmkd', '--help']\n"
        "from mmkd.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'dask', 'distributed', 'zarr', 'pyarrow', 'numpy', 'pydantic', 'sklearn', 'open_clip'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert not {'store', 'extract', 'distill', 'cli'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout


def test_store_works_without_torch_and_dask() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'dask', 'distributed', 'open_clip', 'sklearn'): sys.modules[name] = None\n"
        "import importlib, pathlib, mmkd.store\n"
        "for path in sorted(pathlib.Path(mmkd.store.__file__).parent.glob('*.py')):\n"
        "    importlib.import_module(f'mmkd.store.{path.stem}') if path.stem != '__init__' else None\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_core_opens_stores_with_its_own_dependencies_alone(small_store: Path) -> None:
    absent = "PIL dask duckdb faiss fsspec h5py jinja2 matplotlib obstore open_clip pandas plotly pydicom scipy sklearn"
    script = (
        "import sys\n"
        "class Absent:\n"  # not None in sys.modules: pyarrow would take it for pandas
        "    def find_spec(self, name, *_):\n"
        f"        if name.partition('.')[0] in {[*absent.split(), 'torch', 'transformers']!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from mmkd.store import FeatureStore\n"
        f"store = FeatureStore.open({str(small_store)!r})\n"
        "assert store.verify(deep=True).sound and store.image('alpha').shape == (600, 8)\n"
        f"sys.argv = ['mmkd', 'store', 'info', {str(small_store)!r}]\n"
        "from mmkd.cli.main import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "600 ok" in done.stdout


def mmkd_without(packages: str, words: str) -> subprocess.CompletedProcess[str]:
    """What `mmkd WORDS` does where these packages are not installed."""
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({packages.split()!r}))\n"
        f"sys.argv = ['mmkd', *{words.split()!r}]\n"
        "from mmkd.cli.main import main; main()\n"
    )
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.integration
@pytest.mark.parametrize("words", ["teachers list", "teachers show plip", "doctor --json"])
def test_who_the_teachers_are_needs_no_extra(words: str) -> None:
    absent = "dask distributed h5py huggingface_hub obstore open_clip PIL sklearn timm torch torchvision transformers"
    done = mmkd_without(absent, words)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "plip" in done.stdout


def test_a_misspelt_teacher_is_told_before_torch_is_loaded() -> None:
    done = mmkd_without("torch", "extract pairs.csv store --teachers plipp")
    assert done.stderr.startswith("Error: no teacher is called 'plipp': did you mean 'plip'?"), done.stderr


def test_a_misspelt_key_of_a_run_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("store: features\nout: run\nstudent: {model: ViT-B-16}\nepoch: 3\n")
    done = mmkd_without("torch", f"distill {tmp_path / 'run.yaml'}")
    assert done.stderr == f"Error: {tmp_path / 'run.yaml'}: epoch: unknown key; did you mean 'epochs'?\n"


def test_a_wrong_corpus_path_is_told_before_torch_is_loaded() -> None:
    done = mmkd_without("torch", "extract nowhere.csv store --teachers plip")
    assert done.stderr.startswith("Error: corpus nowhere.csv does not exist; name a CSV"), done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        ("extract pairs.csv store", "dask", "extract"),
        ("teachers check plip", "torch", "extract"),
        ("distill run.yaml", "torch", "distill"),
        ("export run out", "torch", "distill"),
        ("evaluate run suite.yaml", "scipy", "evaluate"),
        ("store report store out.html", "PIL", "inspect"),
        ("teachers compare nowhere plip", "torch", "extract"),
        ("demo", "torch", "demo"),
    ],
)
def test_an_extra_that_is_missing_is_named(tmp_path: Path, words: str, package: str, extra: str) -> None:
    (tmp_path / "run.yaml").write_text("store: features\nout: run\nstudent: {model: ViT-B-16}\n")
    done = mmkd_without(package, words.replace("run.yaml", str(tmp_path / "run.yaml")))
    said = f"Error: this command needs the package {package!r}; run: {install_command(extra)}\n"
    assert (done.returncode, done.stderr) == (1, said), done.stderr


@pytest.mark.parametrize("package", ["mmkd.store", "mmkd.evaluate", "mmkd.extract.teachers", "mmkd.extract.corpora"])
def test_all_names_what_can_be_imported(package: str) -> None:
    import importlib

    module = importlib.import_module(package)
    assert list(module.__all__) == sorted(
        module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = module.surely_not_there
