"""The demo, step by step. Each step is one command that a user could type; the demo prints it, then does it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from mmkd.demo.corpus import build_corpus
from mmkd.demo.specialists import train_specialists
from mmkd.distill.config import load_run
from mmkd.distill.export import export
from mmkd.distill.trainer import train
from mmkd.evaluate import ResultTable, load_suite, result_table, run_suite
from mmkd.extract.config import ExtractConfig
from mmkd.extract.report import summary_lines
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers

Say = Callable[[str], None]

STUDENT = "student"
ENSEMBLE = "ensemble-of-nine"

# A plain CLIP in open_clip's own terms, small enough to train on two cores in about a minute and a half:
# a modified ResNet on 48 pixels and a two-layer text transformer. Nothing of the teachers is in it.
STUDENT_MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 48, "layers": [1, 1, 1, 1], "width": 24, "head_width": 32, "patch_size": None},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}
RUN = {
    "store": "features",
    "out": "run",
    "student": {"model": "student-model.json"},
    "epochs": 10,
    "batch_size": 64,
    "data": {"crop_scale": [0.6, 1.0], "workers": 1},
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 40, "weight_decay": 0.05},
    "checkpoints": {"every_steps": 100},
}
SUITE = {
    "suite": "demo",
    "store": "eval-features",
    "settings": {"linear_probe": {"fractions": [1.0]}},
    "datasets": [
        {
            "dataset": "held-out",
            "label": "class",
            "domain": "domain",
            "role": "report",
            "rows": {"test": {"split": "test"}},
            "prompts": {"rows": {"split": "prompt"}},
            "tasks": ["zero_shot"],
            "notes": "crops of pixels, slices or frames that no training crop has; prompts of other wording",
        }
    ],
}


def run_demo(folder: Path, say: Say = print) -> ResultTable:
    """Do what is left of the demo in `folder`, print the table of scores, and return it.

    Raises:
        UserError: a package of `mmkd[demo]` is missing.
        MmkdError: see the single steps.
    """
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    slugs = _corpus_and_teachers(folder, say)
    teachers = ",".join(f"{slug}=local-dir:{folder / 'teachers' / slug}" for slug in slugs)
    _extract(folder / "corpus" / "train", folder / "features", teachers, say)
    _student(folder, say)
    with_student = f"{teachers},{STUDENT}=local-dir:{folder / STUDENT}"
    _extract(folder / "corpus" / "eval", folder / "eval-features", with_student, say)
    suite = SUITE | {"models": [*slugs, STUDENT], "ensembles": {ENSEMBLE: slugs}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    say(f"\n$ mmkd evaluate run {folder / 'suite.yaml'} --out {folder / 'scores'}")
    run_suite(load_suite(folder / "suite.yaml"), folder / "scores")
    table = result_table(folder / "scores", "zero_shot", metric="bacc")
    (folder / "scores" / "table.md").write_text(table.markdown())
    say("\n" + _compact(table))
    say(_verdict(table, slugs))
    say(_where(folder, time.monotonic() - started))
    return table


def _corpus_and_teachers(folder: Path, say: Say) -> list[str]:
    """Make the corpus and the nine specialists, once; return their names."""
    marker = folder / "teachers" / "done.json"
    if not marker.is_file():
        say("cutting crops out of real images that lie in installed packages ...")
        summary = build_corpus(folder / "corpus")
        say(f"{summary.train:,} training pairs and {summary.test:,} held-out images of {len(summary.classes)} classes")
        say("tuning nine specialists: frozen EfficientNet-Lite0 and MiniLM, linear heads of one domain each ...")
        made = train_specialists(summary.train_csv, folder / "teachers")
        marker.write_text(json.dumps([path.name for path in made]))
    names: list[str] = json.loads(marker.read_text())
    return names


def _extract(corpus: Path, store: Path, teachers: str, say: Say) -> None:
    first, _, _ = teachers.partition(",")
    say(f"\n$ mmkd extract {corpus} {store} --teachers {first},...")
    config = ExtractConfig(corpus=str(corpus), store=store, teachers=tuple(parse_teachers(teachers)))
    for line in summary_lines(extract(config, say)):
        say(line)


def _student(folder: Path, say: Say) -> None:
    if (folder / STUDENT).is_dir():
        return
    (folder / "student-model.json").write_text(json.dumps(STUDENT_MODEL, indent=1))
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    say(f"\n$ mmkd distill {folder / 'run.yaml'}")
    config = load_run(folder / "run.yaml")
    report = train(config, say)
    say(f"{report.steps} steps in {report.seconds:.0f} s; losses: {_listed(report.losses)}")
    say(f"\n$ mmkd export {config.out} {folder / STUDENT}")
    export(config.out, folder / STUDENT)


def _listed(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def _compact(table: ResultTable) -> str:
    """The table in terminal width: percent without intervals, which stand in scores/table.md."""
    width = max(len(row) for row in table.rows)
    lines = ["zero-shot balanced accuracy on held-out images, percent, all classes competing (chance 4)"]
    lines.append(" " * width + "".join(f"{column:>12}" for column in table.columns))
    lines += [
        f"{row:{width}}" + "".join(f"{100 * table.value(row, column):12.1f}" for column in table.columns)
        for row in table.rows
    ]
    return "\n".join(lines) + "\n"


def _verdict(table: ResultTable, slugs: list[str]) -> str:
    """The comparison in words, whichever way it went."""
    best = max(slugs, key=lambda slug: table.value(slug, "mean"))
    student, specialist = table.value(STUDENT, "mean"), table.value(best, "mean")
    ensemble = table.value(ENSEMBLE, "mean")
    word = "above" if student > specialist else "not above"
    return (
        f"The student's mean over domains is {student:.1%}, {word} the best single specialist's "
        f"({best}, {specialist:.1%}); the ensemble of all nine has {ensemble:.1%}."
    )


def _where(folder: Path, seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s. In {folder}:
  corpus/          images and captions.csv, train and held-out
  teachers/        nine open_clip folders          student/   the distilled one, another
  features/        the store it learned from       run/       checkpoints, TensorBoard events
  eval-features/   all ten on held-out images      scores/    predictions, table.md with intervals
Go on with:
  mmkd store info {folder / "features"}
  mmkd store verify {folder / "features"}
  mmkd teachers show histology-specialist={"local-dir:" + str(folder / "teachers" / "histology-specialist")}
  mmkd evaluate compare {folder / "suite.yaml"} {STUDENT} --out {folder / "scores"}
  tensorboard --logdir {folder / "run"}"""
