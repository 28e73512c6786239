"""A suite from stored features to its pages, twice, each time into a new folder: seconds of each command, and whether
both runs agree to the last digit. Not part of `make bench`: the suite and its stores are the user's, such as those of
examples/six_tasks.

    MMKD_ROOTS=six-tasks/roots.yaml python -P benchmarks/twice.py examples/six_tasks/suite.yaml [--model student]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 12 * 60


def run_once(suite: Path, out: Path, model: str) -> dict[str, float]:
    """Seconds of every command; their output goes to files in `out`."""
    out.mkdir()
    results, seconds = ["--out", str(out / "results")], {}
    commands = {
        "run": ["run", str(suite), *results],
        "table": ["table", str(suite), *results, "--by", "dataset"],
        "report": ["report", str(suite), str(out / "report.html"), "--model", model, *results],
        "leaderboard": ["leaderboard", str(suite), str(out / "leaderboard.html"), *results],
    }
    for name, command in commands.items():
        program = [sys.executable, "-P", "-c", "from mmkd.cli.main import main; main()", "evaluate", *command]
        started = time.perf_counter()
        with (out / f"{name}.txt").open("w") as told:
            subprocess.run(program, stdout=told, check=True)
        seconds[name] = time.perf_counter() - started
    return seconds


def facts(out: Path) -> dict[str, object]:
    """What must be equal: all lines of the results but their seconds, in any order; predictions, tables and pages."""
    lines = [json.loads(line) for line in (out / "results/results.jsonl").read_text().splitlines()]
    kept = sorted(json.dumps(line | {"seconds": 0}, sort_keys=True) for line in lines)
    files = [*sorted((out / "results/predictions").rglob("*.parquet")), out / "table.txt", *sorted(out.glob("*.html"))]
    return {"results": kept} | {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def main() -> int:
    """The exit status is 1 if the runs differ or one took longer than `LIMIT`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--model", default="student", help="what the report compares with the others")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, most = [], 0.0
        for name in ("first", "second"):
            seconds = run_once(given.suite, Path(folder) / name, given.model)
            most = max(most, sum(seconds.values()))
            print(name, *(f"{command} {taken:.1f} s" for command, taken in seconds.items()), flush=True)
            found.append(facts(Path(folder) / name))
        first, second = found
        differing = [name for name in first | second if first.get(name) != second.get(name)]
        print(f"{len(first['results']):,} lines, {len(first) - 1:,} files; {len(differing)} differ: {differing[:5]}")  # type: ignore[arg-type]
        if "results" in differing:
            pairs = zip(first["results"], second["results"], strict=False)  # type: ignore[call-overload]
            unlike = {name for a, b in pairs for name, _ in json.loads(a).items() ^ json.loads(b).items()}
            print(f"fields of results that differ: {sorted(unlike)}")
        print(f"the longer run: {most / 60:.1f} minutes, limit {LIMIT / 60:.0f}")
        return int(bool(differing) or most > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
