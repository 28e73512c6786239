#!/usr/bin/env python
"""The folder in which the pages of docs/ run as they stand: no hub, no corpus, no GPU; half a minute on a CPU.

usage: python scripts/docs_folder.py FOLDER     needs: pip install '.[demo]' pytest

pairs.csv (300 pairs), more.csv and eval.csv with their pictures, stores `features` and `eval-features`, MMKDCLIP_DATA
in the original's layout, corpora of other kinds, and a hub's cache with BiomedCLIP, PLIP and QuiltNet in the formats
that they are published in, a thousandth of their sizes and with random weights. Their scores mean nothing.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Write the folder, and say how to go there."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty; name a folder that does not exist")
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    from snippet_scene import write_hub, write_scene  # noqa: PLC0415  # after their folders are on the path

    cache = folder / "hub" / "hub"  # below HF_HOME
    write_hub(cache)
    write_scene(folder, cache)
    sys.stdout.write(f"cd {shlex.quote(str(folder))}\nexport HF_HOME=$PWD/hub HF_HUB_OFFLINE=1\n")


if __name__ == "__main__":
    main()
