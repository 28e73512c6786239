"""The demo, step by step. Each step is one command that a user could type; the demo prints it, then runs it."""

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from mmkd.base.config import read_mapping
from mmkd.base.errors import UserError
from mmkd.base.files import disk_errors
from mmkd.demo.corpus import VAGUE_SHARE, WRONG_SHARE, build_corpus
from mmkd.demo.specialists import train_specialists
from mmkd.distill.config import load_run
from mmkd.distill.export import export
from mmkd.distill.trainer import train
from mmkd.evaluate import ResultTable, load_suite, result_table, run_suite
from mmkd.evaluate.compare import compare
from mmkd.evaluate.folder import Question, ResultFolder
from mmkd.extract.config import ExtractConfig
from mmkd.extract.report import summary_lines
from mmkd.extract.run import extract
from mmkd.extract.teachers import parse_teachers

Say = Callable[[str], None]

METRICS = {"bacc": "zero-shot balanced accuracy (chance 4)", "auroc_macro": "zero-shot AUROC (chance 50)"}
SEEDS = "Another seed may lie 2 to 4 points away (standard deviation over five; docs/distillation.md)."

STUDENT = "student"
ALONE = "student-without-teachers"
ENSEMBLE = "ensemble-of-nine"

# The student begins where the specialists began, from published towers with random maps, and the maps alone learn: with
# more, AUROC falls (docs/distillation.md, "The demo's student"). Images are seen whole, as the teachers saw them. Both
# students differ in the objective alone.
RUN: dict[str, Any] = {
    "store": "features",
    "student": {"model": "local-dir:teachers/beginning", "lock": {"image": 16, "text": 6}},
    "epochs": 8,
    "batch_size": 64,
    "data": {"crop_scale": [1.0, 1.0], "workers": 1},
    "optimizer": {"lr": 3.0e-3, "warmup_steps": 10, "weight_decay": 0.05},
    "checkpoints": {"every_steps": 100, "keep_last": 1},
}
# The captions are known to be noisy, so the pairs count a tenth: docs/distillation.md, table "found".
RUNS: dict[str, dict[str, Any]] = {
    STUDENT: {"preset": "distil", "loss": {"task": 0.1}, "policy": {"keys": "known"}},
    ALONE: {"preset": "pretrain"},
}
SUITE = read_mapping(Path(__file__).with_name("suite.yaml"))


def run_demo(folder: Path, say: Say = print) -> ResultTable:
    """Finish the demo in `folder`, print the tables of scores, and return that of the balanced accuracy. Raises
    UserError if a package of the extra `demo` is missing or a signal stopped a training, and as the single steps."""
    started = time.monotonic()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    slugs = _corpus_and_teachers(folder, say)
    teachers = ",".join(f"{slug}=local-dir:{folder / 'teachers' / slug}" for slug in slugs)
    _extract(folder / "corpus" / "train", folder / "features", teachers, say)
    for name in RUNS:
        _student(folder, name, say)
    with_students = ",".join([teachers, *(f"{name}=local-dir:{folder / name}" for name in RUNS)])
    _extract(folder / "corpus" / "eval", folder / "eval-features", with_students, say)
    suite = SUITE | {"models": [*slugs, *RUNS], "ensembles": {ENSEMBLE: slugs}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    say(f"\n$ mmkd evaluate run {folder / 'suite.yaml'} --out {folder / 'scores'}")
    run_suite(load_suite(folder / "suite.yaml"), folder / "scores")
    tables = {metric: result_table(folder / "scores", "zero_shot", metric=metric) for metric in METRICS}
    (folder / "scores" / "table.md").write_text("\n".join(table.markdown() for table in tables.values()))
    for metric, table in tables.items():
        say("\n" + _compact(table, METRICS[metric]))
    for line in _verdict(folder / "scores", tables):
        say(line)
    say(_where(folder, time.monotonic() - started))
    return tables["bacc"]


def _corpus_and_teachers(folder: Path, say: Say) -> list[str]:
    """Make the corpus and the nine specialists, once; return their names."""
    marker = folder / "teachers" / "done.json"
    if not marker.is_file():
        say("cutting crops out of real images in installed packages ...")
        summary = build_corpus(folder / "corpus")
        say(
            f"{summary.train:,} training pairs of {len(summary.classes)} classes, {VAGUE_SHARE:.0%} of the captions "
            f"vague, {WRONG_SHARE:.0%} wrong; as many private pairs for the teachers; {summary.test:,} held-out images"
        )
        say("tuning nine specialists: frozen EfficientNet-Lite0 and MiniLM, linear heads, one domain each ...")
        made = train_specialists(summary.private_csv, folder / "teachers")
        marker.write_text(json.dumps([path.name for path in made]))
    return json.loads(marker.read_text())


def _extract(corpus: Path, store: Path, teachers: str, say: Say) -> None:
    first, _, _ = teachers.partition(",")
    say(f"\n$ mmkd extract {corpus} {store} --teachers {first},...")
    config = ExtractConfig(corpus=str(corpus), store=store, teachers=tuple(parse_teachers(teachers)))
    for line in summary_lines(extract(config, say)):
        say(line)


def _student(folder: Path, name: str, say: Say) -> None:
    if (folder / name).is_dir():
        return
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(RUNS[name] | RUN | {"out": f"runs/{name}"}, sort_keys=False))
    say(f"\n$ mmkd distill {path}")
    config = load_run(path)
    report = train(config, say)
    if report.stop_signal:
        raise UserError(f"{report.stopped} stopped {name} after step {report.steps}; continue with: mmkd demo {folder}")
    losses = ", ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
    say(f"{report.steps} steps in {report.seconds:.0f} s; losses: {losses}")
    say(f"\n$ mmkd export {config.out} {folder / name}")
    export(config.out, folder / name)


def _compact(table: ResultTable, what: str) -> str:
    """Return the table in terminal width: percent without intervals, which are in scores/table.md."""
    width = max(len(row) for row in table.rows)
    lines = [f"{what} on held-out images, percent, all classes competing"]
    lines.append(" " * width + "".join(f"{column:>12}" for column in table.columns))
    lines += [
        f"{row:{width}}" + "".join(f"{100 * table.value(row, column):12.1f}" for column in table.columns)
        for row in table.rows
    ]
    return "\n".join(lines) + "\n"


def _verdict(scores: Path, tables: dict[str, ResultTable]) -> list[str]:
    alone = compare(ResultFolder(scores), STUDENT, Question("zero_shot", "bacc"), (ALONE,)).rivals[0].mean
    table, domains = tables["auroc_macro"], [column for column in tables["auroc_macro"].columns if column != "mean"]
    against = {
        one.rival: one for one in compare(ResultFolder(scores), STUDENT, Question("zero_shot", "auroc_macro")).rivals
    }
    best = {domain: max(against, key=lambda rival: table.value(rival, domain)) for domain in domains}
    verdicts = Counter(against[rival].verdicts.get(domain) for domain, rival in best.items())
    equal = len(domains) - sum(verdicts[verdict] for verdict in ("win", "tie", "loss"))
    assert alone is not None, "there are nine domains"
    return [
        f"Balanced accuracy, mean over domains: {tables['bacc'].value(STUDENT, 'mean'):.1%} with teachers, "
        f"{tables['bacc'].value(ALONE, 'mean'):.1%} without; difference {100 * alone.value:+.1f} points "
        f"[{100 * alone.low:+.1f}, {100 * alone.high:+.1f}] over images.",
        f"AUROC, student against the best other model of each domain: {verdicts['win']} wins, {verdicts['tie']} ties, "
        f"{verdicts['loss']} losses, {equal} without an interval (equal in every resample); mean "
        f"{table.value(STUDENT, 'mean'):.1%}, ensemble of nine {table.value(ENSEMBLE, 'mean'):.1%}.",
        SEEDS,
    ]


def _where(folder: Path, seconds: float) -> str:
    return f"""
Done in {seconds:.0f} s. In {folder}:
  corpus/          images and captions.csv, train and held-out
  teachers/        nine open_clip folders          student/   the distilled one, another; beside it
  features/        the store it learned from       {ALONE}/
  eval-features/   all models on held-out images   runs/      checkpoints, TensorBoard events
  scores/          predictions, table.md with intervals
Go on with:
  mmkd store info {folder / "features"}
  mmkd store verify {folder / "features"}
  mmkd teachers show histology-specialist={"local-dir:" + str(folder / "teachers" / "histology-specialist")}
  mmkd evaluate compare {folder / "suite.yaml"} {STUDENT} --out {folder / "scores"}
  tensorboard --logdir {folder / "runs"}"""
