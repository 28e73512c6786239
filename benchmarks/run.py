"""Run every benchmark of this folder, one after another, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve()


def main() -> int:
    """Run them all; the exit status is the number that failed."""
    failed = 0
    for script in sorted(HERE.parent.glob("*.py")):
        if script != HERE:
            print(f"== {script.stem}", flush=True)
            failed += subprocess.run([sys.executable, "-P", str(script)], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
