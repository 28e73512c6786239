"""Which recipe makes the better student? The demo's real images, three seeds, equal steps; writes a table.

    mmkd demo DEMO                                          once: its stores are used
    python -P benchmarks/students.py DEMO OUT [--seeds 0,1,2] [--epochs 6] [--table docs/students.md]
    python -P benchmarks/students.py DEMO OUT --time        what nine teachers cost a step, for equal time

Each recipe differs from `all teachers` in what its name says and in nothing else. A student is judged once, at the end,
by zero-shot balanced accuracy over all classes of the demo's held-out images. Intervals are Student's t over seeds; the
last column pairs seeds. Finished runs are kept in OUT, so that the script may be stopped and run again; `--finished`
runs nothing and tabulates the recipes that have all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmkd.distill.config import RunConfig
from mmkd.distill.prepare import prepare
from mmkd.distill.trainer import train
from mmkd.distill.world import World
from mmkd.store import FeatureStore

EPOCHS = 6
TURNS = 21
BASE: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": 64,
    "optimizer": {"lr": 1.0e-3, "warmup_steps": 40, "weight_decay": 0.05},
    "data": {"crop_scale": (0.6, 1.0), "workers": 1},
    "logging": {"every_steps": 50, "tensorboard": False},
    "checkpoints": {"every_steps": 10_000, "keep_last": 1},
}
REFERENCE = "all teachers"
STAGE_ONE = "stage 1"
RECIPES: dict[str, dict[str, Any]] = {
    REFERENCE: {},
    "pairs alone": {"loss": {"feature": 0.0, "cross": 0.0}},
    "one random teacher": {"policy": {"kind": "one"}},
    "one random teacher, a sixth more steps": {"policy": {"kind": "one"}, "epochs": EPOCHS + 1},
    "all, bank of all rows instead of the batch": {"loss": {"cross": 0.0, "bank": 1.0, "bank_rows": {"size": 4096}}},
    "all, and their similarities": {"loss": {"relational": 1.0}},
    "stage 1 for a third, then all": {"epochs": EPOCHS - EPOCHS // 3, "begin": STAGE_ONE},
}
# Two-sided 95 % points of Student's t by degrees of freedom (any table).
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Of one run."""
    return out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def run(demo: Path, out: Path, name: str, seed: int, epochs: int = EPOCHS) -> dict[str, float]:
    """Train one student unless that was done; its score, seconds and steps.

    Recipes count in `EPOCHS`: with other `epochs` each gets its share of those.
    """
    folder = folder_of(out, name, seed)
    result = folder / "result.json"
    if not result.is_file():
        changes = dict(RECIPES.get(name, {"epochs": EPOCHS // 3, "loss": {"feature": 0.0, "cross": 0.0}}))
        student: dict[str, Any] = {"model": str(demo / "student-model.json")}
        begin = changes.pop("begin", None)
        if begin is not None:
            run(demo, out, begin, seed, epochs)
            student["start_from"] = folder_of(out, begin, seed)
        held_out = {
            "name": "held-out",
            "where": "split = 'test'",
            "store": demo / "eval-features",
            "label": "class",
            "prompts": "split = 'prompt'",
        }
        places = {"store": demo / "features", "out": folder, "student": student, "seed": seed}
        monitor = {"every_steps": 100_000, "sets": (held_out,)}
        changes["epochs"] = max(1, round(changes.get("epochs", EPOCHS) * epochs / EPOCHS))
        config = RunConfig.model_validate(BASE | places | {"monitor": monitor} | changes)
        started = time.perf_counter()
        report = train(config, say=lambda _: None)
        seconds = time.perf_counter() - started
        if report.stopped:
            raise SystemExit(f"ended by {report.stopped} at step {report.steps}; run the same command to go on")
        told = {"score": report.scores["held-out/bacc"], "seconds": seconds, "steps": report.steps}
        result.write_text(json.dumps(told))
        print(f"{name:45} seed {seed}: {told}", flush=True)
    found: dict[str, float] = json.loads(result.read_text())
    return found


def cost_of_nine(demo: Path) -> float:
    """Seconds of a step with nine teachers over those of the same step with one: the least that a loop made for one
    random teacher could take. Medians in turn, of the thread's own CPU time, which other work on the machine disturbs
    least; reading the features is in it."""
    torch.set_num_threads(1)
    places = {"store": demo / "features", "student": {"model": str(demo / "student-model.json")}, "out": demo / "none"}
    plain = BASE | places | {"data": {"workers": 0}}
    slugs = sorted(FeatureStore.open(demo / "features").teachers)
    runs = [
        prepare(RunConfig.model_validate(plain | {"teachers": teachers}), World(torch.device("cpu")))
        for teachers in (slugs, slugs[:1])
    ]
    with closing(runs[0].batches.from_step(0)) as batches:
        batch = next(batches)
    taken: list[list[float]] = [[], []]
    for turn in range(TURNS + 1):
        for run, found in zip(runs, taken, strict=True):
            started = time.thread_time()
            assert run.batches.teachers is not None
            run.update(replace(batch, targets=run.batches.teachers.gather(batch.rows)))
            if turn:
                found.append(time.thread_time() - started)
    nine, one = (statistics.median(found) for found in taken)
    print(f"a step with {len(slugs)} teachers {1e3 * nine:.1f} ms, with one {1e3 * one:.1f} ms: {nine / one:.3f} times")
    return nine / one


def interval(values: list[float]) -> str:
    """Mean and half width of the 95 % interval, in percent."""
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):z.1f} ± {100 * half:.1f}"


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown, best recipe first."""
    scores = {name: [found["score"] for found in runs] for name, runs in results.items()}
    lines = ["| recipe | steps | balanced accuracy, % | difference to all teachers |", "|---|---|---|---|"]
    for name in sorted(scores, key=lambda key: -statistics.mean(scores[key])):
        paired = [a - b for a, b in zip(scores[name], scores[REFERENCE], strict=True)]
        difference = "" if name == REFERENCE else interval(paired)
        steps = str(int(results[name][0]["steps"])) + (" after stage 1" if "begin" in RECIPES[name] else "")
        lines.append(f"| {name} | {steps} | {interval(scores[name])} | {difference} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is left, then print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--finished", action="store_true")
    parser.add_argument("--time", action="store_true")
    given = parser.parse_args()
    if given.time:
        cost_of_nine(given.demo)
        return
    seeds = [int(seed) for seed in given.seeds.split(",")]
    results: dict[str, list[dict[str, float]]] = {
        name: []
        for name in RECIPES
        if not given.finished or all((folder_of(given.out, name, seed) / "result.json").is_file() for seed in seeds)
    }
    for seed in seeds:
        for name, found in results.items():
            found.append(run(given.demo, given.out, name, seed, given.epochs))
    if len(seeds) > 1:
        text = table(results)
        print(text)
        if given.table:
            before, mark, _ = given.table.read_text().partition("<!-- table -->\n")
            given.table.write_text(before + mark + text)


if __name__ == "__main__":
    main()
