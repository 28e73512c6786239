"""Run the benchmarks of this folder, each in a process of its own, and render what they found to docs/benchmarks.md.

    make bench                                     all of them, at a size for two cores
    make bench BENCH="--only store,select"         some of them; what the others last found stays in the page
    make bench BENCH=--full                        at the size of a real machine

A script belongs to it if it has a function `measure`; README.md beside this file tells the shape of a result. Results
are kept in build/bench/, one file each, with the machine and the versions that gave them: a result of another machine
or other versions is left out of the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The link that lets the checkout be imported as `mmkd`, so that the scripts import each other as `mmkd.benchmarks.x`.
TYPES = ROOT / "build" / "types"
sys.path.insert(0, str(TYPES))

from mmkd.benchmarks.page import Result, gpu_section, render  # noqa: E402
from mmkd.benchmarks.result import ROWS  # noqa: E402
from mmkd.benchmarks.where import describe_machine  # noqa: E402

FIRST = ("store", "extract", "distill")
PAGE = ROOT / "docs" / "benchmarks.md"


def benchmarks() -> list[Path]:
    """Scripts with a `measure`, those of the design's table first, the others by name."""
    found = [path for path in ROOT.glob("benchmarks/*.py") if "\ndef measure(" in path.read_text(encoding="utf-8")]
    return sorted(found, key=lambda path: (FIRST.index(path.stem) if path.stem in FIRST else len(FIRST), path.stem))


def run_one(script: Path, out: Path, full: bool) -> bool:
    """Run a script; its rows go to `out`, with where and when. False, and the old ones stay, if it fails."""
    rows = out.with_suffix(".rows")
    print(f"== {script.stem}", flush=True)
    began, started = datetime.datetime.now(datetime.UTC), time.perf_counter()
    command = [sys.executable, "-P", str(script), "--out", str(rows), *(["--full"] if full else [])]
    paths = os.pathsep.join(filter(None, [str(TYPES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": paths})
    if done.returncode != 0:
        print(f"{script.stem} ended with status {done.returncode}", file=sys.stderr)
        return False
    title = script.read_text(encoding="utf-8").partition('"""')[2].partition('"""')[0].strip()
    result = Result(
        name=script.stem, about=title, date=began.strftime("%Y-%m-%d"), seconds=time.perf_counter() - started,
        full=full, machine=describe_machine(), rows=tuple(ROWS.validate_json(rows.read_bytes())),
    )  # fmt: skip
    rows.unlink()
    out.write_text(result.model_dump_json(indent=1))
    return True


def main() -> int:
    """Run them all; the exit status is the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas; `none` renders what is kept")
    parser.add_argument("--full", action="store_true", help="at the size of a real machine instead of two cores")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to render to")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "bench", help="where results are kept")
    given = parser.parse_args()
    known = {script.stem: script for script in benchmarks()}
    asked = [name for name in given.only.split(",") if name] or list(known)
    asked = [] if asked == ["none"] else asked
    for name in asked:
        if name not in known:
            parser.error(f"no benchmark {name!r}: there are {', '.join(known)}")
    given.results.mkdir(parents=True, exist_ok=True)
    failed = [name for name in asked if not run_one(known[name], given.results / f"{name}.json", given.full)]
    kept = [given.results / f"{name}.json" for name in known]
    results = [Result.model_validate(json.loads(path.read_text())) for path in kept if path.is_file()]
    if results:
        before = given.page.read_text(encoding="utf-8") if given.page.is_file() else ""
        page = f"{render(results, tuple(known))}\n{gpu_section(before)}"
        given.page.write_text(page, encoding="utf-8")
        print(f"wrote {given.page}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
