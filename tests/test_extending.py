"""The parts that docs/extending.md adds work as it says: one module, one line in one table."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fences import ROOT, fences
from planted_store import store_of
from safetensors.torch import save_file

from mmkd.base.errors import TeacherError
from mmkd.extract.teachers import describe_teacher, load_teacher, parse_teachers
from mmkd.extract.teachers.loaders import LOADERS
from mmkd.store.writer import ShardFeatures

# Puts the one line into the table as it is imported, then runs the command line.
WITH_TASK = """
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location

NAME, PATH = "mmkd.evaluate.tasks", sys.argv.pop(1)

class Table(SourceFileLoader):
    def get_code(self, name):
        before, after = open(PATH).read().split("CLASSES: Final = (")
        return compile(before + "CLASSES: Final = (\\n    'centroid_task:NearestCentroid'," + after, PATH, "exec")

class Finder:
    def find_spec(self, name, path=None, target=None):
        return spec_from_file_location(name, PATH, loader=Table(name, PATH)) if name == NAME else None

sys.meta_path.insert(0, Finder())
from mmkd.cli.main import main
main()
"""


LOADER = """
import torch
from torch import nn

from mmkd.extract.teachers.loaders import FileLoader, Plan
from mmkd.extract.teachers.source import weight_files
from mmkd.extract.teachers.tokenizer import TokenizerPlan
from mmkd.extract.teachers.weights import load_strictly, read_weights
from mmkd.store import Preprocessing

NAME = "house.safetensors"

class House(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(3, 3))

    def encode_image(self, image):
        return image.mean((2, 3)) @ self.matrix

    def encode_text(self, text):
        return text[:, :3].float() @ self.matrix

def plan(spec):
    pixels = Preprocessing(image_size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    return Plan(spec, "house", weight_files(spec, (NAME,)), pixels, TokenizerPlan(77), 3, 49408)

def build(plan):
    model = House()
    load_strictly(model, read_weights(*plan.weights.values()), NAME)
    return model

LOADER = FileLoader(plan, build, lambda spec, source, config: source.find(NAME) is not None, f"a folder with {NAME}")
"""


def example(heading: str) -> str:
    """The first Python block after a heading."""
    page = ROOT / "docs" / "extending.md"
    line = page.read_text().splitlines().index(heading)
    return next(fence.text for fence in fences(page) if fence.line > line and fence.language == "python")


@pytest.mark.integration
def test_an_evaluation_task_is_one_module_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "centroid_task.py").write_text(example("## An evaluation task"))
    y = np.arange(40) % 2
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    x[:, 0] += 20 * (2 * y - 1)
    rows = [{"key": f"k{i}", "y": f"c{y[i]}", "split": ("train", "test")[i // 20]} for i in range(40)]
    store_of(tmp_path / "store", rows, ("y", "split"), {"a": ShardFeatures(x, x, np.ones(40, dtype=np.uint8))})
    dataset = {
        "dataset": "d", "label": "y", "tasks": ["nearest_centroid"],
        "rows": {name: {"split": name} for name in ("train", "test")},
        "settings": {"nearest_centroid": {"temperature": 20}},
    }  # fmt: skip
    suite = {"suite": "s", "store": "store", "bootstrap": {"n": 100}, "datasets": [dataset]}

    def mmkd(*arguments: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
        command = [sys.executable, "-c", WITH_TASK, str(ROOT / "evaluate" / "tasks.py"), "evaluate", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    checked = mmkd("check", "suite.yaml")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "d [report, unspecified: nearest_centroid]: train 20 (20 groups), test 20 (20 groups)" in checked.stdout
    ran = mmkd("run", "suite.yaml", "--out", "out", "--jobs", "1")
    assert ran.returncode == 0, ran.stderr
    table = mmkd("table", "suite.yaml", "--out", "out", "--task", "nearest_centroid")
    assert "100.0" in table.stdout
    dataset["settings"] = {"nearest_centroid": {"temprature": 20}}
    assert "did you mean 'temperature'?" in mmkd("check", "suite.yaml").stderr
    dataset |= {"settings": {}, "label": None}
    assert "d: nearest_centroid needs `label` and `rows: train`" in mmkd("check", "suite.yaml").stderr


def test_a_teacher_loader_is_one_module_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("house_loader.py").write_text(LOADER)
    monkeypatch.setitem(LOADERS, "house", "house_loader")
    Path("files").mkdir()
    save_file({"matrix": torch.eye(3)}, "files/house.safetensors")
    (spec,) = parse_teachers("mine=local-dir:files")
    card = describe_teacher(spec)
    assert card.loader.startswith("house:")
    teacher = load_teacher(spec, card, torch.device("cpu"))
    white = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    assert teacher.encode_images(white).tolist() == [[1.0, 1.0, 1.0]]
    save_file({"matrix": torch.eye(2)}, "files/house.safetensors")
    with pytest.raises(TeacherError, match="wrong shape"):
        load_teacher(spec, describe_teacher(spec), torch.device("cpu"))
    Path("files/house.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"expected an open_clip folder or .* or a folder with house\.safetensors"):
        describe_teacher(spec)
