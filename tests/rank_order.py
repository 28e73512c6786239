"""One rank of a run that only looks at its batches: `torchrun rank_order.py RUN.yaml FIRST OUT`.

Writes, for every step from FIRST on, what this rank is given to OUT/<ranks>-<rank>.json.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mmkd.distill.config import load_run
from mmkd.distill.prepare import prepare
from mmkd.distill.world import join_ranks


def look(path: Path, first: int, out: Path) -> None:
    """Note rows, positions, columns of the captions, and a digest of each picture and each teacher's row."""
    with join_ranks(1.0) as world:
        run, seen = prepare(load_run(path), world), []
        with closing(run.batches), closing(run.batches.from_step(first)) as batches:
            for batch in batches:
                pictures = [hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in batch.images]
                teachers = [target.image.float().sum(dim=1).tolist() for target in batch.targets]
                told = {"step": batch.step, "epoch": batch.epoch}
                each = zip(
                    batch.rows.tolist(), batch.columns, batch.positions.tolist(), pictures, *teachers, strict=True
                )
                seen.append(told | {"samples": [list(sample) for sample in each]})
        (out / f"{world.size}-{world.rank}.json").write_text(json.dumps(seen))


def joined(out: Path, ranks: int) -> list[dict[str, Any]]:
    """What all ranks were given, in order of rank, step by step."""
    parts = [json.loads((out / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]
    steps = []
    for step in zip(*parts, strict=True):
        told = {name: [part[name] for part in step] for name in ("step", "epoch")}
        assert all(len(set(values)) == 1 for values in told.values()), told
        samples = [part["samples"] for part in step]
        assert len({len(mine) for mine in samples}) == 1
        steps.append({name: values[0] for name, values in told.items()} | {"samples": list(chain(*samples))})
    assert [step["step"] for step in steps] == list(np.arange(len(steps)) + steps[0]["step"])
    return steps


if __name__ == "__main__":
    look(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
